// What changes from one second to the next: the cards and the table of trials.
const board = (() => {
  const at = (id) => document.getElementById(id);
  const short = (n) => n === null || n === undefined ? "" : Number(n.toPrecision(4)).toLocaleString("en", {maximumSignificantDigits: 4});
  const whole = (n) => Math.round(n).toLocaleString("en");

  // a cell, or anything else, that changes only where it must: what has the focus keeps it
  const text = (element, said) => { if (element.textContent !== String(said)) element.textContent = said; };

  const card = (title, value, note = "", tone = "") => [title, value, note, tone];
  const showCards = (state) => {
    const cards = [], memory = state.memory || {};
    const size = (bytes) => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${Math.round(bytes / 1e6)} MB`;
    if (state.best) cards.push(card(state.runs ? "Best so far" : "Best", short(state.best.value), `${state.metric}, trial ${state.best.trial}`, "best"));
    if (state.total) cards.push(card("Trials over", `${state.over} of ${state.total}`, typeof state.progress === "number" && state.runs ? `${Math.round(100 * state.progress)} % of the records` : ""));
    if (state.runs && typeof state.tokens_per_second === "number") cards.push(card("Speed", whole(state.tokens_per_second), "tokens/s, all trials"));
    if (memory.cpu) cards.push(card("Memory", size(memory.gpu || memory.cpu), memory.gpu ? `GPU; ${size(memory.cpu)} of the host` : "of the workers"));
    if (state.runs && state.phase === "searches") cards.push(card("Time left", state.left_said || "–", state.left_said ? "then the proof" : "can't be told yet"));
    const list = at("cards");
    while (list.children.length > cards.length) list.lastChild.remove();
    for (const [place, [title, value, note, tone]] of cards.entries()) {
      const item = list.children[place] || list.appendChild(document.createElement("li"));
      if (!item.children.length) item.append(...["span", "strong", "span"].map((kind) => document.createElement(kind)));
      item.className = `card ${tone}`;
      for (const [i, said] of [title, value, note].entries()) text(item.children[i], said);
    }
  };

  const showTrials = (state, leads) => {
    at("board").hidden = !state.trials.length;
    if (!state.trials.length) return;
    const names = ["place", "trial", state.metric, ...state.further, "settings", "records", "state", "tokens/s", ""];
    const table = at("trials-table"), head = table.tHead.rows[0] || table.tHead.insertRow();
    if (head.cells.length !== names.length)
      head.replaceChildren(...names.map((name) => Object.assign(document.createElement("th"), {textContent: name})));
    const body = table.tBodies[0], focused = document.activeElement;
    const known = new Map([...body.rows].map((row) => [row.dataset.trial, row]));
    const rows = state.trials.map((trial) => {
      const row = known.get(String(trial.trial)) || document.createElement("tr");
      if (!row.cells.length) {
        row.dataset.trial = trial.trial;
        for (const name of names) row.insertCell().dataset.name = name;
        const settings = row.cells[names.indexOf("settings")];
        settings.className = "words";
        settings.removeAttribute("data-name");
        const meter = Object.assign(document.createElement("span"), {className: "meter"});
        meter.append(document.createElement("span"));
        row.cells[names.indexOf("records")].append(document.createElement("span"), meter);
        row.cells[names.length - 1].className = "does";
        row.cells[names.length - 1].removeAttribute("data-name");
        for (const [what, said] of [["samples", "Samples"], ["stop", "Stop"], ["clone", "Clone…"]]) {
          const button = row.cells[names.length - 1].appendChild(document.createElement("button"));
          Object.assign(button, {type: "button", className: "small", textContent: said});
          button.dataset.do = what;
          button.setAttribute("aria-label", `${said} of trial ${trial.trial}`.replace("Stop of", "Stop").replace("Clone… of", "Clone"));
        }
      }
      const best = state.best && state.best.trial === trial.trial;
      row.className = (best ? "best" : "") + (trial.state === "failed" ? " gone" : "");
      const values = [trial.value, ...state.further.map((name) => trial.metrics[name])].map(short);
      const speed = trial.runs && trial.tokens_per_second ? whole(trial.tokens_per_second) : "";
      const of = trial.seed_of === null ? "" : `, again trial ${trial.seed_of}`;
      const cells = [trial.place ?? "", trial.trial + of, ...values, trial.configuration, null, trial.state + (trial.reason ? `: ${trial.reason}` : ""), speed];
      for (const [i, said] of cells.entries()) if (said !== null) text(row.cells[i], said);
      const records = row.cells[names.indexOf("records")];
      text(records.firstChild, whole(trial.records));
      records.lastChild.firstChild.style.width = `${Math.min(100, 100 * trial.records / state.budget)}%`;
      for (const button of row.cells[names.length - 1].children)
        button.hidden = button.dataset.do === "samples" ? !trial.answered : button.dataset.do === "stop" ? !(leads && trial.can_stop) : !(leads && trial.config && trial.rung);
      return row;
    });
    if (rows.length !== body.rows.length || rows.some((row, i) => row !== body.rows[i])) body.replaceChildren(...rows);
    if (focused !== document.activeElement && document.contains(focused)) focused.focus();
  };

  return {showCards, showTrials, text};
})();
