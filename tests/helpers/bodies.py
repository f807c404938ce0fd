"""Bodies of requests that are no JSON object, by their content type; None: none is stated."""

WRONG_TYPE, NO_JSON = (415, "not_json"), (400, "invalid_json")
INVALID, OBJECT = "the body is not valid JSON", "the body must be a JSON object, not "
JSON = "application/json"

# content type, body, (status, code of the error), how its message begins
NO_OBJECTS = [
    ("text/plain", b'{"command": "prove"}', WRONG_TYPE, f"Content-Type 'text/plain': the body must be {JSON}"),
    ("multipart/form-data; boundary=x", b"--x--", WRONG_TYPE, "Content-Type 'multipart/form-data': the body must be"),
    ("application/octet-stream", b"\xff\xfe\x00", WRONG_TYPE, "Content-Type 'application/octet-stream'"),
    (JSON, b"\xff\xfe\x00", NO_JSON, INVALID),
    (JSON, b'{"model": ', NO_JSON, INVALID),
    (JSON, b"", NO_JSON, INVALID),
    ("application/x-www-form-urlencoded", b"command=prove", NO_JSON, INVALID),  # as `curl -d` calls it
    (JSON, b'[{"command": "prove"}]', NO_JSON, OBJECT + "list"),
    ("Application/JSON; charset=utf-8", b"[]", NO_JSON, OBJECT + "list"),
    (JSON, b'"prove"', NO_JSON, OBJECT + "str"),
    (None, b"null", NO_JSON, OBJECT + "NoneType"),
]
