// What goes on beyond the right edge fades there. In the list of pages the current one is seen.
function fade(at) {
  at.classList.toggle("more", at.scrollLeft + at.clientWidth < at.scrollWidth - 2);
}
const strips = document.querySelectorAll("body > nav, article pre, main > pre");
addEventListener("resize", () => strips.forEach(fade));
for (const strip of strips) {
  strip.addEventListener("scroll", () => fade(strip));
  const current = strip.querySelector("[aria-current]");
  if (current)
    strip.scrollLeft = current.offsetLeft + current.offsetWidth + 70 - strip.clientWidth;
  fade(strip);
}
if (innerWidth < 720)
  for (const list of document.querySelectorAll("details")) list.open = false;

// An equation, its card and its lines of code light up together.
for (const at of document.querySelectorAll("[data-q]")) {
  const light = on => {
    for (const other of document.querySelectorAll("[data-q]"))
      other.classList.toggle("lit", on && [...other.dataset.q].some(q => at.dataset.q.includes(q)));
  };
  at.addEventListener("mouseenter", () => light(true));
  at.addEventListener("mouseleave", () => light(false));
  at.addEventListener("focusin", () => light(true));
  at.addEventListener("focusout", () => light(false));
}

// The maps over the noise levels: see experiments/maps.py for what is stored.
const HEAT = [[0, 32, 76], [124, 123, 120], [255, 234, 70]];
const CHOICES = ["#8dd3c7", "#ffffb3", "#bebada", "#fb8072", "#80b1d3", "#fdb462", "#b3de69",
                 "#fccde5", "#d9d9d9", "#bc80bd", "#ccebc5", "#ffed6f"];

function colour(tile, value) {
  if (tile.kind == "choice") return CHOICES[value % CHOICES.length];
  if (tile.kind == "grey") return `rgb(${[17, 17, 17].map(one => one * value)})`;
  if (tile.kind == "rows") return value ? "#e69f00" : "#7a8290";
  const share = Math.min(1, value / tile.most) * 2, left = Math.min(1, Math.floor(share));
  return `rgb(${HEAT[left].map((a, i) => a + (HEAT[left + 1][i] - a) * (share - left))})`;
}

function drawTile(tile, canvas, now) {
  const frames = tile.kind == "rows" ? tile.frames : [tile.frames[now]];
  const cell = tile.kind == "choice" ? 24 : tile.kind == "rows" ? 4 : 1;
  const rows = frames.length * frames[0].length / tile.columns, pen = canvas.getContext("2d");
  canvas.width = tile.columns * cell;
  canvas.height = rows * cell;
  [...frames.join("")].forEach((digit, i) => {
    const x = i % tile.columns, y = Math.floor(i / tile.columns), value = parseInt(digit, 36);
    pen.globalAlpha = tile.kind == "rows" && y != now ? 0.35 : 1;
    pen.fillStyle = colour(tile, value);
    pen.fillRect(x * cell, y * cell, cell, cell);
    if (tile.kind == "choice") {
      pen.fillStyle = "#111";
      pen.font = "14px sans-serif";
      pen.textAlign = "center";
      pen.fillText(value, x * cell + 12, y * cell + 17);
    }
  });
}

function drawCurve(curve, maps, svg, now) {
  const top = Math.max(...curve.values);
  const at = i => [8 + maps.t[i] * 90, 35 - 30 * curve.values[i] / top], [x, y] = at(now);
  const points = curve.values.map((_, i) => at(i).join()).join(" ");
  svg.innerHTML = `<path d="M8 3V35H98" fill="none" stroke="currentColor" stroke-width=".2"/>
    <polyline points="${points}" fill="none" stroke="currentColor" stroke-width=".6"/>
    <circle cx="${x}" cy="${y}" r="1.5" fill="#d55e00"/>
    <text x="1" y="6">${top.toPrecision(2)}</text><text x="1" y="36">0</text>
    <text x="8" y="39">t = 0</text><text x="90" y="39">t = 1</text>`;
}

for (const section of document.querySelectorAll(".maps")) {
  const maps = JSON.parse(section.querySelector("script").textContent);
  const [slider, output, tiles] = ["input", "output", ".tiles"].map(s => section.querySelector(s));
  const add = (tag, wide, label) => {
    const figure = tiles.appendChild(document.createElement("figure"));
    const drawn = figure.appendChild(tag == "svg" ?
      document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag));
    figure.className = wide ? "wide" : "";
    drawn.setAttribute("role", "img");
    drawn.setAttribute("aria-label", label);
    figure.appendChild(document.createElement("figcaption")).textContent = label;
    return drawn;
  };
  const canvases = maps.tiles.map(tile => add("canvas", tile.kind == "rows", tile.label));
  const curves = maps.curves.map(curve => add("svg", true, curve.label));
  for (const svg of curves) svg.setAttribute("viewBox", "0 0 100 40");
  const draw = () => {
    const now = Number(slider.value), t = `t = ${maps.t[now].toFixed(2)}`;
    output.textContent = t;
    slider.setAttribute("aria-valuetext", t);
    maps.tiles.forEach((tile, i) => drawTile(tile, canvases[i], now));
    maps.curves.forEach((curve, i) => {
      drawCurve(curve, maps, curves[i], now);
      curves[i].nextSibling.textContent = `${curve.label}: ${curve.values[now]}`;
    });
  };
  slider.addEventListener("input", draw);
  draw();
}
