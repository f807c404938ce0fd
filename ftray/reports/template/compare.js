// The room that asks two models of an endpoint, and shows their answers side by side.
const compare = (() => {
  const at = (id) => document.getElementById(id);
  let stopping = null, task = "CAUSAL_LM", templates = {}, common = null, call = null;

  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  // tasks that read and don't generate: where to ask, what for, and the answer as text
  const reads = {
    SEQ_CLS: {path: "v1/classify", asked: "Text", body: (text) => ({input: text, pair: at("pair").value || null}),
      shown: ({labels, data: [{probs}]}) => labels.map((label, i) => [label, probs[i]])
        .sort((a, b) => b[1] - a[1]).map(([label, share]) => `${percent(share)}  ${label}`)},
    TOKEN_CLS: {path: "v1/classify", asked: "Text", body: (text) => ({input: text}),
      shown: ({data: [{words, tags, probs}]}) =>
        words.map((word, i) => `${word}  ${tags[i]}  ${percent(Math.max(...probs[i]))}`)},
    FEATURE_EXTRACTION: {path: "v1/embeddings", asked: "Texts, one a line: how like the first is each?",
      body: (text) => ({input: text.split("\n").filter((line) => line.trim())}),
      shown: ({data}, {input}) => data.map(({embedding}, i) =>
        `${embedding.reduce((sum, x, k) => sum + x * data[0].embedding[k], 0).toFixed(3)}  ${input[i]}`)},
  };

  // fill the room from the endpoint that `get` asks
  const begin = async (asks) => {
    call = asks;
    const models = (await call.get("v1/models")).data.map((model) => model.id);
    const kept = [0, 1].map((side) => at("model-" + side).value);
    for (const side of [0, 1]) at("model-" + side).replaceChildren(...models.map((name) => new Option(name)));
    at("model-1").value = models.includes("best") ? "best" : models[models.length - 1];
    const run = await call.get("v1/run");
    task = run.task;
    if (task in reads) {
      at("what").textContent = "text";
      at("asked").textContent = reads[task].asked;
      at("generation").hidden = true;
      at("paired").hidden = task !== "SEQ_CLS";
      if (task !== "FEATURE_EXTRACTION" && models.length > 1) at("model-0").value = models[1];  // the base has no classes
    }
    for (const side of [0, 1]) if (models.includes(kept[side])) at("model-" + side).value = kept[side];
    [templates, common] = [run.templates, run.template];
    at("template").value = run.template || "{prompt}";
    showForm();
    showSearch(run, models);
    at("problem").textContent = "";
  };

  const showForm = () => { at("templated").hidden = at("form").value !== "plain"; };

  // the template of a model's prompts; null: the chat template, which the endpoint applies
  const templateOf = (model) => {
    if (at("form").value === "own") return model in templates ? templates[model] : common;
    return at("form").value === "chat" ? null : at("template").value;
  };

  const showSearch = (run, models) => {
    at("models-of-search").hidden = run.trials.length === 0;
    const line = (cells, kind) => {
      const row = document.createElement("tr");
      for (const text of cells) row.appendChild(document.createElement(kind)).textContent = text;
      return row;
    };
    at("leaderboard").tHead.replaceChildren(line(["", "trial", run.metric, "configuration", "status", "ask it"], "th"));
    at("leaderboard").tBodies[0].replaceChildren(...run.trials.map((trial, place) => {
      const row = line([place + 1, trial.trial, trial.value === null ? "" : trial.value.toFixed(4), trial.configuration,
        trial.status], "td"), cell = row.appendChild(document.createElement("td"));
      row.children[3].className = "words";
      if (models.includes(`trial-${trial.trial}`))
        for (const [side, name] of ["left", "right"].entries()) {
          const button = cell.appendChild(document.createElement("button"));
          [button.className, button.type, button.textContent] = ["small", "button", name];
          button.setAttribute("aria-label", `trial ${trial.trial} on the ${name}`);
          button.addEventListener("click", () => { at("model-" + side).value = `trial-${trial.trial}`; });
        }
      return row;
    }));
  };

  const read = async (side, signal) => {
    const {path, body, shown} = reads[task], asked = {model: at("model-" + side).value, ...body(at("prompt").value)};
    const began = performance.now(), got = await (await call.post(path, asked, signal)).json();
    at("answer-" + side).textContent = shown(got, asked).join("\n");
    at("speed-" + side).textContent = `${got.usage.prompt_tokens} tokens, ${Math.round(performance.now() - began)} ms`;
  };

  const answer = async (side, signal) => {
    const text = at("prompt").value, model = at("model-" + side).value, template = templateOf(model), chat = template === null;
    const body = {model, stream: true, stream_options: {include_usage: true},
      max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value)};
    if (chat) body.messages = [{role: "user", content: text}];
    else body.prompt = template.replace("{prompt}", () => text);
    const response = await call.post(chat ? "v1/chat/completions" : "v1/completions", body, signal);
    const began = performance.now(), reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let buffer = "", chunk; !(chunk = await reader.read()).done;) {
      const events = (buffer + chunk.value).split("\n\n");
      buffer = events.pop();
      for (const data of events.map((event) => event.slice(event.indexOf("data: ") + 6))) {
        if (data === "[DONE]") continue;
        const part = JSON.parse(data);
        if (part.error) throw new Error(part.error.message);
        for (const choice of part.choices)
          at("answer-" + side).textContent += (chat ? choice.delta.content : choice.text) || "";
        if (part.usage) {
          const seconds = (performance.now() - began) / 1000, tokens = part.usage.completion_tokens;
          at("speed-" + side).textContent = `${tokens} tokens, ${(tokens / seconds).toFixed(1)} tokens/s`;
        }
      }
    }
  };

  // words that only one of the two answers has
  const mark = () => {
    const texts = [0, 1].map((side) => at("answer-" + side).textContent);
    if (!texts[0] || !texts[1]) return;
    for (const [side, stretches] of differences(...texts).entries())
      at("answer-" + side).replaceChildren(...stretches.map(([text, own]) => {
        if (!own) return new Text(text);
        const marked = document.createElement("mark");
        marked.textContent = text;
        return marked;
      }));
  };

  at("ask").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (stopping) return;
    stopping = new AbortController();
    at("send").disabled = !(at("stop").disabled = false);
    for (const id of ["problem", "answer-0", "answer-1", "speed-0", "speed-1"]) at(id).textContent = "";
    const done = await Promise.allSettled([0, 1].map((side) => (task in reads ? read : answer)(side, stopping.signal)));
    const failed = done.find((one) => one.status === "rejected" && one.reason.name !== "AbortError");
    if (failed) at("problem").textContent = failed.reason.message;
    else if (!(task in reads)) mark();
    stopping = null;
    at("send").disabled = !(at("stop").disabled = true);
  });
  at("stop").addEventListener("click", () => stopping && stopping.abort());
  at("form").addEventListener("change", showForm);
  at("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
  });
  return {begin};
})();
