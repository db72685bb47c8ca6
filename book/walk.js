// The figures to play with (companion.report.walk): a place on the line between two networks, marked on the measured
// plane and on the measured curve. Two native sliders, or a checkbox where there are two cases: keyboard and touch work
// as everywhere. All numbers come from the figure's own data.
document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll("figure.walk")) {
    const cases = JSON.parse(figure.dataset.walk);
    const one = (selector) => figure.querySelector(selector);
    const maps = [...figure.querySelectorAll(".walk-map")];
    const points = [...figure.querySelectorAll(".walk-point")];
    const caption = one("figcaption");
    const [left, width] = [+figure.dataset.left, +figure.dataset.width];

    const controls = document.createElement("div");
    controls.className = "walk-controls";
    const slider = (label, max, value) => {
      const box = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "range", min: 0, max, step: 1 });
      input.value = value;
      const text = document.createElement("span");
      text.textContent = label;
      box.append(text, input);
      controls.append(box);
      return input;
    };
    const last = cases[0].line.length - 1;
    const alpha = slider("α, from A to B", last, Math.floor(last / 2));
    let choose;
    if (cases.length === 2) {
      const box = document.createElement("label");
      choose = Object.assign(document.createElement("input"), { type: "checkbox" });
      box.append(choose, ` ${figure.dataset.switch}`);
      controls.append(box);
    } else {
      choose = slider(figure.dataset.switch, cases.length - 1, 0);
    }
    caption.before(controls);
    caption.setAttribute("aria-live", "polite");

    const show = () => {
      const number = choose.type === "checkbox" ? +choose.checked : +choose.value;
      const now = cases[number];
      maps.forEach((map, i) => { map.style.display = i === number ? "" : "none"; });
      points.forEach((point, i) => point.setAttribute("transform", `translate(${now.points[i].join(" ")})`));
      const [[ax, ay], [bx, by]] = now.ends;
      const share = alpha.value / last;
      const set = (selector, values) => {
        for (const [name, value] of Object.entries(values)) one(selector).setAttribute(name, value);
      };
      set(".walk-segment", { x1: ax, y1: ay, x2: bx, y2: by });
      set(".walk-here-map", { cx: ax + share * (bx - ax), cy: ay + share * (by - ay) });
      set(".walk-line", { d: now.path });
      const error = now.line[alpha.value];
      const [, y] = now.path.slice(1).split(" L")[alpha.value].split(" ");
      set(".walk-here-line", { cx: left + share * width, cy: y });
      const name = choose.type === "checkbox" ? now.label : `${figure.dataset.switch} ${now.label}`;
      const says = `${name}, α = ${share.toFixed(2)}: a test error of ${error.toFixed(1)} %`;
      if (choose.type === "range") choose.setAttribute("aria-valuetext", now.label);
      alpha.setAttribute("aria-valuetext", `α = ${share.toFixed(2)}, error ${error.toFixed(1)} %`);
      caption.textContent = `${says} (at the ends ${now.line[0].toFixed(1)} % and ${now.line[last].toFixed(1)} %).`;
    };
    controls.addEventListener("input", show);
    show();
  }
});
