/* The controls of a report: what is compared, the validation, classes, confusion and gallery. */

const element = (id) => document.getElementById(id);
const percent = (value, digits = 1) => value === null || value === undefined ? "" : (100 * value).toFixed(digits);
const signed = (value, digits = 1) => value === null ? "" : (value < 0 ? "−" : "+") + Math.abs(100 * value).toFixed(digits);
const base = () => element("base")?.value ?? "", chosen = () => element("chosen")?.value ?? "";

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function cell(row, text) { row.insertCell().textContent = text; }

/* The curves: which validation, and whether with what is published. */

async function showValidation() {
  const charts = await allCharts, slider = element("validation");
  const curves = ["gmacs", "latency"].filter((id) => charts[id]);
  const steps = curves.map((id) => charts[id].validations.map(({step}) => step))
    .reduce((a, b) => a.length >= b.length ? a : b);
  const number = slider ? +slider.value : steps.length - 1;
  if (slider) element("step").textContent = `step ${steps[number]} (${number + 1} of ${steps.length})`;
  for (const id of curves) {
    const chart = charts[id];
    const validation = chart.validations.findLast(({step}) => step <= steps[number]) ?? chart.validations[0];
    const published = !element("published") || element("published").checked;
    const shared = chart.data.slice(0, chart.shared).filter((trace) => published || trace.name !== "published");
    const layout = {...chart.layout, xaxis: {...chart.layout.xaxis}, yaxis: {...chart.layout.yaxis}};
    if (chart.shared && !published) for (const axis of ["x", "y"]) {
      const values = validation.data.flatMap((trace) => trace[axis]);
      const low = Math.min(...values), high = Math.max(...values), room = 0.12 * (high - low || Math.abs(high) || 1);
      layout[`${axis}axis`].range = [low - room, high + room];
    }
    await draw(id, {data: [...shared, ...validation.data], layout});
  }
}

function listenToPoints() {
  for (const id of ["gmacs", "latency"]) {
    const box = element(id);
    if (!box || !box.on || box.listens) continue;
    box.listens = true;
    box.on("plotly_click", ({points: [point]}) => {
      const name = point.customdata;
      const option = [...element("chosen").options].find((each) => each.value === name);
      if (option) { element("chosen").value = name; showChosen(); }
    });
  }
}

/* IoU of each class. */

async function showClasses() {
  const table = element("classes");
  if (!table) return;
  const {columns, classes} = await readData("page");
  const from = columns.indexOf(base()), to = columns.indexOf(chosen());
  const changes = classes.map(({iou}) => iou[from] == null || iou[to] == null ? null : iou[to] - iou[from]);
  const largest = Math.max(0.001, ...changes.map(Math.abs));
  for (const row of table.tBodies[0].rows) {
    const change = changes[row.dataset.index], where = row.cells[1];
    where.textContent = signed(change);
    where.dataset.value = change ?? "";
    const share = change === null ? 0 : 90 * Math.abs(change) / largest;
    const side = change < 0 ? "loss" : "gain";
    where.style.background =
      `linear-gradient(to left, color-mix(in srgb, var(--${side}) 28%, transparent) ${share}%, transparent ${share}%)`;
    [...row.cells].forEach((each, i) => each.classList.toggle("chosen", i - 2 === to));
  }
  [...table.tHead.rows[0].cells].forEach((each, i) => each.classList.toggle("chosen", i - 2 === to));
  sortTable(table, 1, false);
}

function findClass() {
  const word = element("find").value.trim().toLowerCase();
  for (const row of element("classes").tBodies[0].rows)
    row.hidden = !row.cells[0].textContent.toLowerCase().includes(word);
}

/* Confusion. */

let confusion = null;

async function readConfusion() {
  if (confusion) return confusion;
  const found = await readData("confusion");
  const bytes = await inflate(found.shares), half = bytes.length / 2;
  const shares = Float32Array.from({length: half}, (_, i) => (256 * bytes[i] + bytes[half + i]) / 65535);
  const size = found.classes.length;
  const share = (setting, label, predicted) => shares[(setting * size + label) * size + predicted];
  confusion = {...found, size, share};
  return confusion;
}

async function showConfusion() {
  if (!element("confusion") || !element("confusion").dataset.near) return;
  const {settings, classes, labelled, pixels, size, share} = await readConfusion();
  const [from, to] = [settings.indexOf(base()), settings.indexOf(chosen())];
  const view = element("view").value;
  const value = view === "base" ? (i, j) => share(from, i, j)
    : view === "chosen" ? (i, j) => share(to, i, j) : (i, j) => share(to, i, j) - share(from, i, j);
  const missing = (view !== "chosen" && from < 0) || (view !== "base" && to < 0);
  const z = [], text = [], shownNames = classes.map(escaped);
  for (let i = 0; i < size; i++) {
    z.push([]);
    text.push([]);
    for (let j = 0; j < size; j++) {
      const shown = missing || !labelled[i] ? null : value(i, j);
      z[i].push(shown === null ? null : Math.sign(shown) * Math.sqrt(Math.abs(shown)));
      text[i].push(shown === null ? "" : `${shownNames[i]}<br>${i === j ? "predicted right" : `taken for ${shownNames[j]}`}: `
        + `${view === "change" ? signed(shown, 2) : percent(shown, 2)} %`);
    }
  }
  const accent = color("accent"), card = color("card");
  const scale = view === "change" ? [[0, color("loss")], [0.5, card], [1, accent]]
    : [[0, card], [0.5, dark.matches ? "#2f6f9f" : "#8fbfe3"], [1, dark.matches ? "#d8eeff" : "#0d3f6b"]];
  const ticks = (view === "change" ? [-1, -0.1, 0, 0.1, 1] : [0, 0.01, 0.1, 0.5, 1]);
  const names = size <= 32 ? {tickvals: classes.map((_, i) => i), ticktext: shownNames, tickangle: -60}
    : {showticklabels: false, ticks: ""};
  const axis = {showgrid: false, zeroline: false, automargin: true, ...names};
  await draw("confusion", {
    data: [{type: "heatmap", z, text, hoverinfo: "text", hoverongaps: false, colorscale: scale,
      zmin: view === "change" ? -1 : 0, zmax: 1, xgap: size <= 32 ? 1 : 0, ygap: size <= 32 ? 1 : 0,
      colorbar: {thickness: 10, outlinewidth: 0, tickvals: ticks.map((t) => Math.sign(t) * Math.sqrt(Math.abs(t))),
        ticktext: ticks.map((t) => `${100 * t} %`)}}],
    layout: {paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: {}, margin: {l: 50, r: 10, t: 16, b: 50},
      xaxis: {...axis, title: {text: "predicted", standoff: 8}, constrain: "domain"},
      yaxis: {...axis, title: {text: "label", standoff: 8}, tickangle: 0, autorange: "reversed", scaleanchor: "x", constrain: "domain"}},
  });

  const pairs = [];
  const of = view === "base" ? from : to;
  for (let i = 0; of >= 0 && i < size; i++)
    for (let j = 0; j < size; j++) {
      const here = share(of, i, j);
      if (i !== j && here > 0) pairs.push({i, j, here, before: from < 0 ? null : share(from, i, j)});
    }
  const weight = {pixels: ({i, here}) => here * labelled[i], share: ({here}) => here,
    growth: ({i, here, before}) => (here - before) * labelled[i]}[element("weight").value];
  pairs.sort((a, b) => weight(b) - weight(a));
  const body = element("pairs").tBodies[0];
  body.replaceChildren();
  for (const {i, j, here, before} of pairs.slice(0, +element("count").value)) {
    const row = body.insertRow();
    cell(row, classes[i]);
    cell(row, classes[j]);
    cell(row, percent(here));
    cell(row, before === null ? "" : signed(here - before));
    cell(row, percent(here * labelled[i] / pixels, 3));
  }
}

/* Gallery. */

let gallery = null;

async function buildGallery() {
  const box = element("gallery");
  gallery = await readData("gallery");
  gallery.colors = new Uint32Array(256).fill(0xff000000);
  gallery.palette.forEach(([r, g, b], i) => { gallery.colors[i] = (0xff000000 | (b << 16) | (g << 8) | r) >>> 0; });
  gallery.images.forEach((image, number) => {
    const figure = document.createElement("figure");
    figure.className = "picture";
    figure.dataset.index = number;
    const caption = document.createElement("figcaption");
    caption.textContent = image.name;
    const panels = document.createElement("div");
    panels.className = "panels";
    for (const kind of ["image", "label", "base", "chosen", "difference"]) {
      const panel = document.createElement("div");
      panel.className = "panel";
      panel.dataset.kind = kind;
      const title = document.createElement("span");
      const picture = document.createElement(kind === "image" ? "img" : "canvas");
      picture.style.aspectRatio = `${image.width} / ${image.height}`;
      if (kind === "image") picture.alt = image.name;
      panel.append(title, picture);
      panels.append(panel);
    }
    figure.append(caption, panels);
    box.append(figure);
  });
  whenNear(box.children, paint, unpaint);
  box.addEventListener("pointermove", tellClass);
  box.addEventListener("pointerleave", (event) => tell(event, ""));
}

async function paint(figure) {
  const image = gallery.images[figure.dataset.index];
  figure.near = true;
  if (!figure.maps) {
    const bytes = await inflate(image.maps), area = image.width * image.height, count = bytes.length / area;
    const maps = Array.from({length: count}, (_, map) => Uint8Array.from({length: area}, (_, i) => bytes[i * count + map]));
    if (!figure.near) return;
    figure.maps = maps;
  }
  const picture = figure.querySelector("img");
  if (!picture.src) picture.src = `data:image/jpeg;base64,${image.jpeg}`;
  const from = gallery.settings.indexOf(base()), to = gallery.settings.indexOf(chosen());
  const shown = {label: figure.maps[0], base: figure.maps[from + 1], chosen: figure.maps[to + 1]};
  if (from < 0) shown.base = null;
  if (to < 0) shown.chosen = null;
  figure.shown = shown;
  const titles = {image: "image", label: "label", difference: "where they differ"};
  for (const [kind, name, index] of [["base", base(), from], ["chosen", chosen(), to]])
    titles[kind] = index < 0 ? `${name}: no picture` : `${name} · ${percent(image.right[index])} % right`;
  await picture.decode().catch(() => null);
  for (const panel of figure.querySelectorAll(".panel")) {
    const {kind} = panel.dataset;
    panel.firstChild.textContent = titles[kind];
    panel.firstChild.title = titles[kind];
    const canvas = panel.querySelector("canvas");
    if (!canvas || !figure.near) continue;
    [canvas.width, canvas.height] = [image.width, image.height];
    if (kind === "difference") drawDifference(canvas, shown, picture);
    else if (shown[kind]) drawColors(canvas, (i) => gallery.colors[shown[kind][i]]);
  }
}

function unpaint(figure) {
  figure.near = false;
  figure.maps = null;
  figure.querySelector("img").removeAttribute("src");
  for (const canvas of figure.querySelectorAll("canvas")) canvas.width = canvas.height = 0;
}

const LOST = 0xff0c66e0, GAINED = 0xffd8862c, OTHER = 0xff9a9a9a;

function drawDifference(canvas, {label, base: before, chosen: after}, picture) {
  if (!before || !after) return;
  const marks = document.createElement("canvas");
  [marks.width, marks.height] = [canvas.width, canvas.height];
  drawColors(marks, (i) => before[i] === after[i] ? 0 : before[i] === label[i] ? LOST : after[i] === label[i] ? GAINED : OTHER);
  const context = canvas.getContext("2d");
  context.globalAlpha = 0.3;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 1;
  context.drawImage(marks, 0, 0);
}

function tellClass(event) {
  const picture = event.target.closest("img, canvas"), figure = event.target.closest(".picture");
  if (!picture || !figure || !figure.maps) { tell(event, ""); return; }
  const pixel = pixelAt(event, picture, gallery.images[figure.dataset.index]);
  const name = (map) => map ? gallery.classes[map[pixel]] ?? "ignored" : "";
  tell(event, `label: ${name(figure.shown.label)}\n${base()}: ${name(figure.shown.base)}`
    + `\n${chosen()}: ${name(figure.shown.chosen)}`);
}

function showGallery() {
  const box = element("gallery");
  if (!gallery) return;
  const from = gallery.settings.indexOf(base()), to = gallery.settings.indexOf(chosen());
  const lost = (figure) => {
    const {right} = gallery.images[figure.dataset.index];
    return from < 0 || to < 0 ? 0 : right[from] - right[to];
  };
  const figures = [...box.children];
  const key = element("order").value === "lost" ? (figure) => -lost(figure) : (figure) => +figure.dataset.index;
  figures.sort((a, b) => key(a) - key(b) || a.dataset.index - b.dataset.index);
  box.append(...figures);
  for (const figure of figures) if (figure.near) paint(figure);
}

/* All together. */

async function showChosen() {
  showGallery();
  await Promise.all([showClasses(), showConfusion()]);
}

async function start() {
  for (const id of ["validation", "published"]) if (element(id)) element(id).addEventListener("input", showValidation);
  for (const id of ["base", "chosen"]) if (element(id)) element(id).addEventListener("change", showChosen);
  if (element("find")) element("find").addEventListener("input", findClass);
  for (const id of ["view", "weight", "count"]) if (element(id)) element(id).addEventListener("change", showConfusion);
  if (element("order")) element("order").addEventListener("change", showGallery);
  const matrix = element("confusion");
  if (matrix) whenNear([matrix], () => { matrix.dataset.near = "1"; showConfusion(); });
  if (element("gallery")) whenNear([element("gallery")], () => buildGallery());
  await showClasses();
  await plotlyReady;
  const drawn = new MutationObserver(listenToPoints);
  for (const id of ["gmacs", "latency"])
    if (element(id)) drawn.observe(element(id), {attributes: true, attributeFilter: ["data-drawn"]});
  listenToPoints();
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
