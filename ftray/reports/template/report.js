const report = (() => {
  const tip = document.getElementById("tip");
  const light = (trial) => {
    for (const lit of document.querySelectorAll(".lit")) lit.classList.remove("lit");
    for (const plot of document.querySelectorAll(".plot.dim")) plot.classList.remove("dim");
    if (trial === undefined) return;
    for (const mark of document.querySelectorAll(`.plot [data-trial="${CSS.escape(trial)}"]`)) {
      mark.classList.add("lit");
      mark.closest(".plot").classList.add("dim");
    }
  };
  const point = (event) => {
    const target = event.target.closest ? event.target.closest("[data-tip], [data-trial]") : null;
    light(target ? target.dataset.trial : undefined);
    const said = target && target.dataset.tip;
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said;
    const box = target.getBoundingClientRect();
    const [x, y] = event.clientX === undefined ? [box.left, box.bottom] : [event.clientX, event.clientY];
    tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? Math.max(4, y - 12 - tip.offsetHeight) : y + 18}px`;
  };
  document.addEventListener("pointerover", point);
  document.addEventListener("focusin", point);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { tip.hidden = true; light(); } });

  const searchable = () => {
    const tools = document.getElementById("sample-tools");
    if (!tools || !tools.hidden) return;
    tools.hidden = false;
    const list = document.getElementById("sample-list"), all = [...list.children];
    const wanted = document.getElementById("sample-search"), order = document.getElementById("sample-order");
    const texts = new Map(all.map((sample) => [sample, sample.textContent.toLowerCase()]));
    const show = () => {
      const words = wanted.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const sample of all) {
        sample.hidden = !words.every((word) => texts.get(sample).includes(word));
        shown += !sample.hidden;
      }
      const sorted = order.value === "best" ? all : [...all].reverse();
      list.append(...sorted);
      document.getElementById("sample-count").textContent = `${shown} of ${all.length}`;
    };
    wanted.addEventListener("input", show);
    order.addEventListener("change", show);
    show();
  };

  // what is new in the page: tips of its figures, which work on touch screens too, and the search in its samples
  const prepare = () => {
    for (const title of document.querySelectorAll(".plot title")) {
      title.parentElement.dataset.tip = title.textContent;
      title.remove();
    }
    searchable();
  };
  prepare();
  return {prepare};
})();
