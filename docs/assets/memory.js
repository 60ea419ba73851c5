// The figure of figure.md: what a memory holds as pairs are written. All numbers come from memory.json.
(() => {
  const figure = document.getElementById("memory-figure");
  if (!figure) return;
  const data = JSON.parse(figure.querySelector("script").textContent);
  const writes = data.order.length, count = data.keys.length, width = data.keys[0].length;
  let chosen = data.memories[1], step = count, timer = null;

  const add = (parent, name, attributes = {}, text = "") => {
    const svg = parent.namespaceURI.endsWith("svg") || name === "svg";
    const child = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) child.setAttribute(key, value);
    if (text) child.textContent = text;
    return parent.appendChild(child);
  };
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  // errors of the keys that have been written
  const errors = (memory, t) => memory.errors[t - 1].filter((error) => error !== null);

  // controls
  const controls = add(figure, "div", { class: "controls" });
  const choice = add(controls, "fieldset");
  add(choice, "legend", {}, "Memory");
  for (const memory of data.memories) {
    const label = add(choice, "label");
    const radio = add(label, "input", { type: "radio", name: "memory", value: memory.name });
    radio.checked = memory === chosen;
    radio.addEventListener("change", () => { chosen = memory; draw(); });
    label.append(" " + memory.label);
  }
  const row = add(controls, "div", { class: "steps" });
  add(row, "label", { for: "memory-step" }, "Writes");
  const slider = add(row, "input", { type: "range", id: "memory-step", min: 1, max: writes, value: step });
  slider.addEventListener("input", () => { stop(); step = +slider.value; draw(); });
  const button = add(row, "button", { type: "button", class: "md-button" }, "Play");
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  const advance = () => { step = Math.min(step + 1, writes); draw(); if (step === writes) stop(); };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (step === writes) { step = 1; draw(); }
    button.textContent = "Pause";
    timer = setInterval(advance, 800);
  });
  const summary = add(figure, "p", { "aria-live": "polite" });

  // panels
  const panels = add(figure, "div", { class: "panels" });
  const panel = (size) => {
    const box = add(panels, "figure");
    const svg = add(box, "svg", { viewBox: `0 0 ${size[0]} ${size[1]}`, role: "img" });
    return { svg, caption: add(box, "figcaption") };
  };
  const stored = panel([320, 260]), read = panel([320, 260]), curve = panel([640, 260]);
  curve.svg.parentNode.classList.add("wide");

  // a signed number as a cell: blue below 0, orange above, empty at 0
  const cell = (svg, x, y, size, value, title) => {
    const rect = add(svg, "rect", { x, y, width: size - 1, height: size - 1, class: value < 0 ? "minus" : "plus",
      "fill-opacity": Math.min(1, Math.abs(value) / 0.7).toFixed(2) });
    add(rect, "title", {}, `${title}: ${value.toFixed(2)}`);
  };

  const drawStored = () => {
    const { svg, caption } = stored;
    svg.replaceChildren();
    if (chosen.states) {
      const size = 26, left = 70, top = 30;
      add(svg, "text", { x: left, y: 18 }, "value channels");
      add(svg, "text", { x: -top, y: left - 12, transform: "rotate(-90)", "text-anchor": "end" }, "key channels");
      chosen.states[step - 1].forEach((line, i) => line.forEach((value, j) =>
        cell(svg, left + j * size, top + i * size, size, value, `key channel ${i + 1}, value channel ${j + 1}`)));
      caption.textContent = `Stored: a matrix of ${width} x ${width} numbers, whatever is written.`;
    } else {
      const size = 14, left = 40, top = 30, second = left + width * size + 12;
      add(svg, "text", { x: left, y: 18 }, "keys");
      add(svg, "text", { x: second, y: 18 }, chosen.name === "deltaformer" ? "writes u" : "values");
      for (let i = 0; i < step; i++) {
        add(svg, "text", { x: left - 8, y: top + i * size + 11, "text-anchor": "end" }, i + 1);
        for (let j = 0; j < width; j++) {
          cell(svg, left + j * size, top + i * size, size, data.keys[data.order[i]][j], `write ${i + 1}, key`);
          cell(svg, second + j * size, top + i * size, size, chosen.cache[i][j], `write ${i + 1}, value`);
        }
      }
      caption.textContent = `Stored: a cache of ${step} x ${2 * width} numbers, one row per write.`;
    }
    svg.setAttribute("aria-label", caption.textContent);
  };

  const drawRead = () => {
    const { svg, caption } = read;
    svg.replaceChildren();
    const left = 60, top = 8, height = 20, scale = 130;
    const last = data.order[step - 1];
    chosen.errors[step - 1].forEach((error, key) => {
      const y = top + key * height;
      const now = key === last ? "now" : "";
      add(svg, "text", { x: left - 8, y: y + 13, "text-anchor": "end", class: now }, `key ${key + 1}`);
      if (error === null) return;
      add(svg, "rect", { x: left, y: y + 2, width: Math.max(1, Math.min(error, 1.5) * scale), height: height - 6, class: `bar ${now}` });
      add(svg, "text", { x: left + Math.min(error, 1.5) * scale + 6, y: y + 13 }, error.toFixed(2));
    });
    add(svg, "line", { x1: left, x2: left, y1: top, y2: top + count * height, class: "axis" });
    caption.textContent = "Read: error of each key; the key just written is bold.";
    svg.setAttribute("aria-label", caption.textContent + " " +
      chosen.errors[step - 1].map((e, i) => (e === null ? "" : `key ${i + 1}: ${e.toFixed(2)}`)).filter(Boolean).join(", "));
  };

  const drawCurve = () => {
    const { svg, caption } = curve;
    svg.replaceChildren();
    const x = (t) => 40 + (t - 1) * (440 / (writes - 1)), y = (error) => 220 - Math.min(error, 1.1) * 190;
    for (const tick of [0, 0.5, 1]) {
      add(svg, "line", { x1: 40, x2: 480, y1: y(tick), y2: y(tick), class: "grid" });
      add(svg, "text", { x: 32, y: y(tick) + 4, "text-anchor": "end" }, tick);
    }
    for (const tick of [1, 4, 8, 12, 16]) add(svg, "text", { x: x(tick), y: 238, "text-anchor": "middle" }, tick);
    add(svg, "text", { x: 260, y: 256, "text-anchor": "middle" }, "writes");
    add(svg, "line", { x1: x(step), x2: x(step), y1: 20, y2: 220, class: "axis" });
    for (const memory of data.memories) {
      const line = Array.from({ length: writes }, (_, t) => `${x(t + 1)},${y(mean(errors(memory, t + 1)))}`);
      add(svg, "polyline", { points: line.join(" "), class: memory === chosen ? "line now" : "line" });
      add(svg, "text", { x: 488, y: y(mean(errors(memory, writes))) + 4, class: memory === chosen ? "now" : "" }, memory.label);
    }
    add(svg, "circle", { cx: x(step), cy: y(mean(errors(chosen, step))), r: 4, class: "dot" });
    caption.textContent = "Mean error over the keys written so far.";
    svg.setAttribute("aria-label", caption.textContent);
  };

  const draw = () => {
    slider.value = step;
    const key = data.order[step - 1] + 1, again = data.order.indexOf(key - 1) < step - 1;
    const what = again ? `a new value at key ${key}` : `key ${key}`;
    slider.setAttribute("aria-valuetext", `write ${step} of ${writes}: ${what}`);
    const found = errors(chosen, step);
    summary.textContent = `Write ${step} of ${writes}, ${what}. ${chosen.label}: mean error ` +
      `${mean(found).toFixed(2)}, largest ${Math.max(...found).toFixed(2)}.`;
    drawStored(); drawRead(); drawCurve();
  };
  draw();
})();
