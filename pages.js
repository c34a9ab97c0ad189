"use strict";
/* What all pages share: unpacking, charts with names that do not overlap, sortable tables. */

const textsOfData = new Map();

/** Text that the page holds as base64 of zlib. */
function readText(name) {
  if (!textsOfData.has(name)) {
    const packed = document.getElementById(`data-${name}`).textContent;
    textsOfData.set(name, inflate(packed).then((bytes) => new TextDecoder().decode(bytes)));
  }
  return textsOfData.get(name);
}

async function readData(name) { return JSON.parse(await readText(name)); }

async function inflate(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const plotlyReady = document.getElementById("data-plotly") && (async () => {
  const script = document.createElement("script");
  script.textContent = await readText("plotly");
  document.head.append(script);
})();

const allCharts = readData("charts");
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = (name) => {
  const probe = document.createElement("i");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

/** The layout of a chart in the colours and the width that the page has now. */
function fitLayout(box, {data, layout}) {
  const narrow = box.clientWidth < 520;
  const fitted = {...layout, autosize: true, font: {...layout.font, color: color("quiet"), size: narrow ? 11 : 12}};
  fitted.hoverlabel = {...layout.hoverlabel, bgcolor: dark.matches ? "#2b3037" : "#ffffff",
    bordercolor: color("line"), font: {color: color("text"), size: 12}};
  const lines = data.filter((trace) => trace.showlegend !== false).length;
  if (lines > (narrow ? 3 : 4)) fitted.legend = {orientation: "h", x: 0, y: -0.22, yanchor: "top"};
  return fitted;
}

/** Draw a chart, or draw it anew. */
async function draw(id, chart) {
  await plotlyReady;
  const box = document.getElementById(id);
  const fresh = !box.data;
  box.chart = chart;
  box.names = "";
  await Plotly.react(box, chart.data, fitLayout(box, chart),
    {displayModeBar: false, responsive: true});
  if (fresh) box.on("plotly_afterplot", () => placeNames(box));
  placeNames(box);
  box.dataset.drawn = "1";
}

/** Write the names of points (trace.meta.labels) where they touch no other name, or not at all. */
function placeNames(box) {
  const named = box.data.filter((trace) => trace.meta && trace.meta.labels && trace.visible !== false);
  if (!named.length || box.placing) return;
  const {xaxis, yaxis, _size: size} = box._fullLayout;
  const at = (x, y) => [xaxis.l2p(x), yaxis.l2p(y)];
  const points = [], segments = [], wanted = [];
  for (const trace of box.data) {
    if (trace.name === "earlier" || trace.visible === false) continue;
    const places = trace.x.map((x, i) => at(x, trace.y[i]));
    if (trace.mode === "lines") for (let i = 1; i < places.length; i++) segments.push([places[i - 1], places[i]]);
    else points.push(...places);
    if (trace.meta && trace.meta.labels)
      trace.meta.labels.forEach((text, i) => text && wanted.push({text, place: places[i], x: trace.x[i], y: trace.y[i]}));
  }
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = "12px system-ui, sans-serif";
  const placed = [];
  const annotations = [];
  for (const {text, place: [x, y], x: dataX, y: dataY} of wanted) {
    if (x < 0 || y < 0 || x > size.w || y > size.h) continue;
    const width = pen.measureText(text).width + 6, height = 15;
    let best = null;
    for (const distance of [9, 22])
      for (const [dx, dy] of [[-1, -1], [1, 1], [1, -1], [-1, 1], [0, -1], [0, 1], [1, 0], [-1, 0]]) {
        const shift = distance * (dx && dy ? 0.75 : 1);
        const left = x + dx * shift + (dx - 1) / 2 * width, top = y + dy * shift + (dy - 1) / 2 * height;
        const area = [left, top, left + width, top + height];
        if (left < -4 || top < -12 || area[2] > size.w + 18 || area[3] > size.h) continue;
        if (placed.some((other) => overlap(area, other))) continue;
        let cost = distance / 20;
        cost += 4 * points.filter(([px, py]) => overlap(area, [px - 6, py - 6, px + 6, py + 6])).length;
        cost += 2 * segments.filter(([from, to]) => crosses(from, to, area)).length;
        if (!best || cost < best.cost) best = {cost, area};
      }
    if (!best || best.cost > 9) continue;
    placed.push(best.area);
    annotations.push({x: dataX, y: dataY, text, showarrow: false, font: {size: 12, color: color("text")},
      xanchor: "left", yanchor: "top", borderpad: 0,
      xshift: Math.round(best.area[0] + 3 - x), yshift: Math.round(y - best.area[1])});
  }
  const layoutOfNames = JSON.stringify(annotations);
  if (layoutOfNames === box.names) return;
  box.names = layoutOfNames;
  box.placing = true;
  Promise.resolve(Plotly.relayout(box, {annotations})).finally(() => setTimeout(() => { box.placing = false; }, 0));
}

const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

function crosses([x1, y1], [x2, y2], area) {
  for (let i = 0; i <= 24; i++) {
    const x = x1 + (x2 - x1) * i / 24, y = y1 + (y2 - y1) * i / 24;
    if (x > area[0] && x < area[2] && y > area[1] && y < area[3]) return true;
  }
  return false;
}

/** Call once for each element when it comes near the window; again with false when it leaves. */
function whenNear(elements, come, leave) {
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        come(entry.target);
        if (!leave) observer.unobserve(entry.target);
      } else if (leave) leave(entry.target);
    }
  }, {rootMargin: "300px"});
  for (const element of elements) observer.observe(element);
}

/** Fill a canvas with colours 0xAABBGGRR, by the numbers of its pixels. */
function drawColors(canvas, colorOf) {
  const context = canvas.getContext("2d");
  const data = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(data.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colorOf(i);
  context.putImageData(data, 0, 0);
}

/** The number of the pixel of a picture of this size that the pointer is at. */
function pixelAt(event, picture, {width, height}) {
  const area = picture.getBoundingClientRect();
  const x = Math.min(width - 1, Math.floor((event.clientX - area.left) / area.width * width));
  const y = Math.min(height - 1, Math.floor((event.clientY - area.top) / area.height * height));
  return y * width + x;
}

/** Say something beside the pointer; an empty text says nothing. */
function tell(event, text) {
  const tip = document.getElementById("tip");
  tip.textContent = text;
  tip.style.display = text ? "block" : "none";
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

function sortTable(table, column, descending) {
  const body = table.tBodies[0], titles = [...table.tHead.rows[0].cells];
  const value = (row) => {
    const {textContent, dataset} = row.cells[column];
    const text = (dataset.value ?? textContent).trim().replace("−", "-");
    const number = parseFloat(text);
    return text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const sign = descending ? -1 : 1;
  const rows = [...body.rows].map((row) => [value(row), row]);
  rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
    : typeof a === "number" && typeof b === "number" ? sign * (a - b) : sign * String(a).localeCompare(String(b)));
  body.append(...rows.map(([, row]) => row));
  titles.forEach((title, i) => i === column
    ? title.setAttribute("aria-sort", descending ? "descending" : "ascending") : title.removeAttribute("aria-sort"));
}

document.addEventListener("click", (event) => {
  const title = event.target.closest(".sortable th");
  if (!title) return;
  const first = title.cellIndex === 0 ? "ascending" : "descending";
  const now = title.getAttribute("aria-sort");
  sortTable(title.closest("table"), title.cellIndex, (now ? now === "ascending" : first === "descending"));
});

allCharts.then((charts) => {
  whenNear(Object.keys(charts).map((id) => document.getElementById(id)), (box) => draw(box.id, box.chart || charts[box.id]));
  dark.addEventListener("change", () => {
    for (const box of document.querySelectorAll(".chart[data-drawn]")) draw(box.id, box.chart);
  });
}).catch((error) => {
  const note = document.createElement("p");
  note.id = "problem";
  note.textContent = "The charts need a browser of 2023 or later (DecompressionStream).";
  document.body.prepend(note);
  console.error(error);
});
