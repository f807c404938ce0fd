// The page: its key, its rooms, what it looks at every two seconds, and the buttons that lead a search.
(() => {
  const {text} = board, LOOKS = 2000;  // milliseconds
  const at = (id) => document.getElementById(id);
  let state = {kind: null, trials: []}, shown = {version: null, trial: null, sections: {}}, asks = false, looked = false;

  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem("ftray-key", given);
    history.replaceState(null, "", location.pathname);
  }
  const headers = () => ({"Content-Type": "application/json", "Authorization": "Bearer " + (sessionStorage.getItem("ftray-key") || "")});
  const refused = async (response) => {
    const body = await response.json().catch(() => ({}));
    const message = body.error ? body.error.message : body.detail ? JSON.stringify(body.detail) : response.statusText;
    return Object.assign(new Error(message), {status: response.status});
  };
  const call = {
    get: async (path) => {
      const response = await fetch(path, {headers: headers()});
      if (!response.ok) throw await refused(response);
      return response.json();
    },
    post: async (path, body, signal) => {
      const response = await fetch(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal});
      if (!response.ok) throw await refused(response);
      return response;
    },
  };

  // rooms: the part of the address after #
  const rooms = ["search", "samples", "compare"];
  let entered = null;
  const room = () => {
    const [name, more] = location.hash.slice(1).split("/");
    if (rooms.includes(name)) return [name, more];
    if (name && at(name) && at("room-search").contains(at(name))) return ["search"];
    return [name && entered ? entered : state.kind && state.steers ? "search" : "compare"];
  };
  const enter = () => {
    const locked = !at("locked").hidden, [name, more] = room();
    for (const each of rooms) at("room-" + each).hidden = locked || each !== name;
    for (const link of document.querySelectorAll(".rooms a")) {
      if (link.dataset.room === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    entered = name;
    if (name === "samples") showTrial(more).catch((error) => banner(error.message));
    if (name === "compare") beginToCompare();
  };
  addEventListener("hashchange", () => {
    enter();
    const id = location.hash.slice(1);
    if (rooms.includes(id.split("/")[0])) scrollTo(0, 0);
    else if (at(id)) at(id).scrollIntoView();
  });

  const beginToCompare = async () => {
    if (asks || !looked) return;
    asks = true;
    try {
      const there = state.steers ? await call.get("v1/live/endpoint") : {there: true};
      at("asking").hidden = !there.there;
      at("no-endpoint").hidden = there.there;
      if (there.there) {
        await compare.begin(call);
        if (document.activeElement === document.body) at("prompt").focus();
      } else {
        at("no-endpoint").textContent = `No endpoint answers at ${there.url}: ${there.start} begins one.`;
        asks = false;
      }
    } catch (error) {
      asks = false;
      at("problem").textContent = error.message;
    }
  };

  const kinds = {searches: "works", prepares: "works", proves: "works", merges: "works", "compares finalists": "works", paused: "held", over: "", "has no driver": "dead"};
  const showState = () => {
    document.title = `${state.name ? state.name + " – " : ""}ftray`;
    text(at("run-name"), state.name && state.kind ? `${state.kind} · ${state.name}` : "");
    at("phase").hidden = !state.phase;
    text(at("phase"), (state.phase || "").split(":")[0]);
    at("phase").className = "phase " + (kinds[state.phase] ?? "works");
    for (const link of document.querySelectorAll(".rooms a"))
      link.hidden = link.dataset.room === "search" ? !state.kind : link.dataset.room === "samples" ? state.kind !== "search" : false;
    text(at("summary"), state.summary || "");
    const dead = state.kind === "search" && state.phase === "has no driver";
    banner(dead ? "No driver runs this search any more. The same ftray tune command with --resume continues it." : "");
    at("bar").hidden = typeof state.progress !== "number";
    if (!at("bar").hidden) {
      const percent = Math.round(100 * state.progress);
      at("bar").setAttribute("aria-valuenow", percent);
      at("bar").firstElementChild.style.width = `${100 * state.progress}%`;
    }
    board.showCards(state);
    const leads = state.steers && state.kind === "search" && state.runs && ["searches", "paused"].includes(state.phase);
    at("steer").hidden = !leads;
    for (const button of at("steer").children)
      button.hidden = (button.dataset.do === "pause" && (state.phase === "paused" || !state.pausable)) || (button.dataset.do === "train-on" && state.phase !== "paused");
    board.showTrials(state, leads);
  };

  // the report: sections that have changed take the place of the old ones
  const showReport = async () => {
    if (!state.kind || shown.version === (state.version || state.phase)) return;
    const version = state.version || state.phase, found = await call.get("v1/live/report");
    shown.version = version;
    text(at("headline"), found.headline);
    const {samples = "", ...others} = found.sections;
    if (state.runs) delete others.trials;
    const parts = {...others}, report_ = at("report");
    for (const section of [...report_.children]) if (!(section.id in parts)) section.remove();
    let before = null;
    for (const [id, html] of Object.entries(parts)) {
      let section = report_.querySelector(`:scope > #${CSS.escape(id)}`);
      if (!section || shown.sections[id] !== html) {
        const scrolled = section ? [...section.querySelectorAll(".table, .scroller")].map((box) => box.scrollLeft) : [];
        const made = document.createElement("template");
        made.innerHTML = html;
        const fresh = made.content.firstElementChild;
        if (section) section.replaceWith(fresh);
        section = fresh;
        if (!section.isConnected) report_.insertBefore(section, before ? before.nextSibling : report_.firstChild);
        for (const [i, box] of [...section.querySelectorAll(".table, .scroller")].entries()) box.scrollLeft = scrolled[i] || 0;
      } else if (before && before.nextSibling !== section) before.after(section);
      before = section;
    }
    if (shown.sections.samples !== samples) {
      at("before-after").innerHTML = samples;
      if (samples) at("before-after").firstElementChild.id = "answers";  // #samples is the room
    }
    shown.sections = {...parts, samples};
    const links = Object.keys(parts).map((id) => {
      const item = document.createElement("li"), link = item.appendChild(document.createElement("a"));
      [link.href, link.textContent] = ["#" + id, at(id).querySelector("h2").textContent];
      return item;
    });
    at("parts").firstElementChild.replaceChildren(...links);
    report.prepare();
    offerToAsk();
  };

  // a record of the samples can be asked of two models
  const offerToAsk = () => {
    for (const sample of document.querySelectorAll("#room-samples .sample")) {
      if (sample.querySelector(":scope > button")) continue;
      const button = sample.appendChild(document.createElement("button"));
      Object.assign(button, {type: "button", className: "small", textContent: "Ask two models this"});
      button.addEventListener("click", () => {
        at("prompt").value = sample.querySelector(".text").textContent;
        location.hash = "#compare";
      });
    }
  };

  const showTrial = async (wanted) => {
    const known = state.trials.filter((trial) => trial.answered).map((trial) => trial.trial).sort((a, b) => a - b);
    const select = at("sample-trial");
    if (select.options.length !== known.length) select.replaceChildren(...known.map((n) => new Option(`trial ${n}`, n)));
    text(at("learning-note"), known.length
      ? "The newest answer first; words that the answer before it did not have are marked."
      : "No answers were kept while the trials learnt: a search that begins with --ui keeps those to a few validation records.");
    select.parentElement.parentElement.hidden = !known.length;
    if (!known.length) return;
    const best = state.best && known.includes(state.best.trial) ? state.best.trial : known[0];
    const number = known.includes(Number(wanted)) ? Number(wanted) : shown.trial ?? best;
    shown.trial = number;
    select.value = number;
    const found = await call.get(`v1/live/trials/${number}`);
    if (shown.trial !== number || shown.answers === found.html) return;
    shown.answers = found.html;
    at("trial-samples").innerHTML = found.html;
    offerToAsk();
  };
  at("sample-trial").addEventListener("change", () => { location.hash = `#samples/${at("sample-trial").value}`; });

  const banner = (said) => {
    at("gone").hidden = !said;
    text(at("gone"), said);
  };
  const toast = (said) => {
    at("toast").hidden = false;
    at("toast").textContent = said;
    clearTimeout(toast.timer);
    toast.timer = setTimeout(() => { at("toast").hidden = true; }, 9000);
  };

  // buttons
  const settings = (trial) => ["adapter", "training"].flatMap((section) =>
    Object.entries(trial.config[section]).map(([key, value]) => `${section}.${key}: ${typeof value === "object" ? JSON.stringify(value) : value}`)).join("\n");
  const asked = {
    stop: (n) => ({title: `Stop trial ${n}?`, said: "It reports what it has reached, which counts, and trains no further.", does: "Stop it", body: () => ({trial: n})}),
    prove: () => ({title: "End the search now?", said: "Each trial reports what it has reached; the best of it is proved on the test records and merged. ftray tune --resume can take the search up again.", does: "End now and prove", body: () => ({})}),
    add: () => {
      const like = state.trials.find((trial) => trial.config && state.best && trial.trial === state.best.trial) || state.trials.find((trial) => trial.config);
      return {title: "Add a trial", said: "It is the next to begin.", does: "Add it", label: "Adapter and training settings, as YAML or JSON",
        text: JSON.stringify(like ? {adapter: like.config.adapter, training: like.config.training} : {adapter: {method: "lora"}, training: {}}, null, 2),
        body: (text) => ({configuration: text})};
    },
    clone: (n) => {
      const trial = state.trials.find((one) => one.trial === n), before = settings(trial);
      return {title: `Clone trial ${n}`, said: "A new trial trains on from its weights, with the settings that you change.", does: "Clone it", label: "Settings, one a line", text: before,
        body: (text) => ({trial: n, changes: Object.fromEntries(text.split("\n").filter((line) => line.trim() && !before.split("\n").includes(line)).map((line) => {
          const [name, ...value] = line.split(":");
          return [name.trim(), value.join(":").trim()];
        }))})};
    },
  };
  let doing = null;
  const press = async (what, n, button) => {
    if (what === "samples") { location.hash = `#samples/${n}`; return; }
    if (what === "pause" || what === "train-on") {
      button.disabled = true;
      try { await send({command: what}); } catch (error) { toast(error.message); }
      button.disabled = false;
      return;
    }
    doing = {what, ...asked[what](n)};
    at("dialog-title").textContent = doing.title;
    at("dialog-said").textContent = doing.said;
    at("dialog-field").hidden = !doing.label;
    at("dialog-label").textContent = doing.label || "";
    at("dialog-text").value = doing.text || "";
    at("dialog-problem").textContent = "";
    at("dialog-do").textContent = doing.does;
    at("dialog").showModal();
    (doing.label ? at("dialog-text") : at("dialog-do")).focus();
  };
  const send = async (body) => {
    const told = await (await call.post("v1/live/requests", body)).json();
    toast(`${told.command}\n${told.said}`);
    look();
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]"), row = button && button.closest("tr");
    if (button) press(button.dataset.do, row ? Number(row.dataset.trial) : null, button);
  });
  at("dialog-no").addEventListener("click", () => at("dialog").close());
  at("dialog-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    at("dialog-do").disabled = true;
    at("dialog-problem").textContent = "";
    try {
      await send({command: doing.what, ...doing.body(at("dialog-text").value)});
      at("dialog").close();
    } catch (error) {
      at("dialog-problem").textContent = error.message;
    }
    at("dialog-do").disabled = false;
  });

  let timer = null;
  const look = async () => {
    clearTimeout(timer);
    try {
      state = {trials: [], further: [], ...await call.get("v1/live")};
      const first = !looked;
      looked = true;
      at("locked").hidden = true;
      showState();
      if (first) enter();
      await showReport();
      if (first) enter();
      else if (room()[0] === "samples") await showTrial(room()[1]);
    } catch (error) {
      if (error.status === 401) {
        at("locked").hidden = false;
        text(at("lock-problem"), sessionStorage.getItem("ftray-key") ? "It is another one." : "ftray ui prints it with the page's address, unless it is yours from FTRAY_API_KEY.");
        enter();
        return;
      }
      banner(error instanceof TypeError
        ? "The server of this page is gone: what you see is how it was last. ftray ui --run OUTPUT opens it again."
        : error.message);
    }
    if (state.kind || !looked) timer = setTimeout(look, LOOKS);
  };
  const unlock = (event) => {
    event.preventDefault();
    if (sessionStorage.getItem("ftray-key") === at("key").value) return;
    sessionStorage.setItem("ftray-key", at("key").value);
    look();
  };
  at("key").addEventListener("change", unlock);
  at("locked").addEventListener("submit", unlock);
  look();
})();
