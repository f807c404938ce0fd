"""What the API of KubeRay 1.6 (`ray.io/v1`) takes: names and types of its fields, as JSON schemas.

Kubernetes is asked here as `kubectl apply` asks it: a field that is not listed is refused. Of a pod, which has some
thousand fields, only those that the files in `cluster/` use are listed.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
NUMBER: Schema = {"type": "number"}
SWITCH: Schema = {"type": "boolean"}
ANYTHING: Schema = {"type": "object"}
QUANTITY: Schema = {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$"}


def fields(required: str = "", **types: Schema) -> Schema:
    return {"type": "object", "properties": types, "required": required.split(), "additionalProperties": False}


def several(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def mapping(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": schema}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


METADATA = fields("name", name=TEXT, namespace=TEXT, labels=mapping(TEXT), annotations=mapping(TEXT))

VARIABLE = fields("name", name=TEXT, value=TEXT, valueFrom=fields(secretKeyRef=fields("name key", name=TEXT, key=TEXT)))
MOUNT = fields("name mountPath", name=TEXT, mountPath=TEXT)
RESOURCES = fields(requests=mapping(QUANTITY), limits=mapping(QUANTITY))
CONTAINER = fields(
    "name image",
    name=TEXT,
    image=TEXT,
    resources=RESOURCES,
    ports=several(fields("containerPort", name=TEXT, containerPort=WHOLE)),
    env=several(VARIABLE),
    volumeMounts=several(MOUNT),
)
VOLUME = fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=fields("claimName", claimName=TEXT),
    configMap=fields("name", name=TEXT),
)
TOLERATION = fields(key=TEXT, operator=one_of("Exists", "Equal"), value=TEXT, effect=TEXT)
POD = fields(
    "spec",
    spec=fields(
        "containers",
        containers={**several(CONTAINER), "minItems": 1},
        volumes=several(VOLUME),
        nodeSelector=mapping(TEXT),
        tolerations=several(TOLERATION),
        securityContext=fields(runAsUser=WHOLE, fsGroup=WHOLE),
    ),
)

GROUP = {"template": POD, "rayStartParams": mapping(TEXT), "resources": mapping(TEXT), "labels": mapping(TEXT)}
HEAD_GROUP = fields("template rayStartParams", **GROUP, serviceType=TEXT, headService=ANYTHING, enableIngress=SWITCH)
WORKER_GROUP = fields(
    "groupName minReplicas maxReplicas template rayStartParams",
    **GROUP,
    groupName=TEXT,
    replicas=WHOLE,
    minReplicas=WHOLE,
    maxReplicas=WHOLE,
    numOfHosts=WHOLE,
    idleTimeoutSeconds=WHOLE,
    suspend=SWITCH,
    scaleStrategy=fields(workersToDelete=several(TEXT)),
)
AUTOSCALER = fields(
    idleTimeoutSeconds=WHOLE,
    upscalingMode=one_of("Default", "Aggressive", "Conservative"),
    version=one_of("v1", "v2"),
    image=TEXT,
    imagePullPolicy=TEXT,
    resources=RESOURCES,
    env=several(VARIABLE),
    envFrom=several(ANYTHING),
    volumeMounts=several(MOUNT),
    securityContext=ANYTHING,
)
CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=several(WORKER_GROUP),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=AUTOSCALER,
    authOptions=fields(mode=one_of("token", "disabled"), secretName=TEXT, enableK8sTokenAuth=SWITCH),
    gcsFaultToleranceOptions=ANYTHING,
    headServiceAnnotations=mapping(TEXT),
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    managedBy=TEXT,
    suspend=SWITCH,
)
JOB = fields(
    rayClusterSpec=CLUSTER,
    clusterSelector=mapping(TEXT),
    entrypoint=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=mapping(TEXT),
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterPodTemplate=POD,
    submitterConfig=fields(backoffLimit=WHOLE),
    backoffLimit=WHOLE,
    activeDeadlineSeconds=WHOLE,
    preRunningDeadlineSeconds=WHOLE,
    shutdownAfterJobFinishes=SWITCH,
    ttlSecondsAfterFinished=WHOLE,
    deletionStrategy=ANYTHING,
    managedBy=TEXT,
    suspend=SWITCH,
)
SERVICE = fields(
    serveConfigV2=TEXT,
    rayClusterConfig=CLUSTER,
    serveService=ANYTHING,
    upgradeStrategy=ANYTHING,
    rayClusterDeletionDelaySeconds=WHOLE,
    excludeHeadPodFromServeSvc=SWITCH,
    managedBy=TEXT,
)


def resource(kind: str, spec: Schema) -> Schema:
    return fields(
        "apiVersion kind metadata spec", apiVersion=one_of("ray.io/v1"), kind=one_of(kind), metadata=METADATA, spec=spec
    )


KINDS = {
    "RayCluster": resource("RayCluster", CLUSTER),
    "RayJob": resource("RayJob", JOB),
    "RayService": resource("RayService", SERVICE),
    "ConfigMap": fields(
        "apiVersion kind metadata data",
        apiVersion=one_of("v1"),
        kind=one_of("ConfigMap"),
        metadata=METADATA,
        data=mapping(TEXT),
    ),
}
