/* Samples with the colours of their classes, after pages.js. */

const element = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

let page = null;
let classes = null;

function make(kind, className, text, parent) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

/** A class with its colour; a click looks for it. */
function makeClass(label, text, parent) {
  const {name, color} = classes.get(label);
  const entry = make("button", "class", "", parent);
  const swatch = make("i", color ? "" : "ignored", "", entry);
  if (color) swatch.style.background = `rgb(${color})`;
  entry.append(`${name} ${text}`);
  entry.addEventListener("click", () => {
    element("find").value = element("find").value === name ? "" : name;
    find();
  });
}

/** The labels of the classes that are looked for. */
function wanted() {
  const text = element("find").value.trim().toLowerCase();
  const names = [...classes.values()].map(({name}) => name.toLowerCase());
  const fits = names.includes(text) ? (name) => name === text : (name) => name.includes(text);
  return new Set([...classes.keys()].filter((_, i) => fits(names[i])));
}

function find() {
  const labels = wanted();
  for (const figure of element("samples").children) {
    figure.hidden = !page.samples[figure.dataset.index].shares.some(([label]) => labels.has(label));
    if (figure.labels) paint(figure);
  }
  const shown = element("samples").querySelectorAll("figure:not([hidden])").length;
  element("shown").textContent = `${shown} of ${page.samples.length}`;
}

async function paint(figure) {
  const sample = page.samples[figure.dataset.index], canvas = figure.querySelector("canvas");
  figure.querySelector("img").src ||= `data:image/jpeg;base64,${sample.jpeg}`;
  if (!canvas) return;
  figure.labels ||= await inflate(sample.mask);
  const {labels} = figure, chosen = wanted(), colors = new Uint32Array(256);
  for (const [label, {color}] of classes)
    if (chosen.has(label) && color) colors[label] = (0xff000000 | (color[2] << 16) | (color[1] << 8) | color[0]) >>> 0;
  const stripes = chosen.has(page.ignored) ? page.stripes.map((grey) => (0xff000000 | grey * 0x010101) >>> 0) : [0, 0];
  [canvas.width, canvas.height] = [sample.width, sample.height];
  drawColors(canvas, (i) => labels[i] !== page.ignored ? colors[labels[i]]
    : stripes[((i % sample.width + Math.floor(i / sample.width)) >> 2) & 1]);
}

function tellClass(event) {
  const figure = event.target.closest("figure"), picture = event.target.closest(".both");
  if (!picture || !figure.labels) { tell(event, ""); return; }
  const label = figure.labels[pixelAt(event, picture, page.samples[figure.dataset.index])];
  tell(event, classes.get(label)?.name ?? "");
}

async function start() {
  page = await readData("samples");
  classes = new Map(page.classes.map((one) => [one.label, one]));
  for (const {label, share, samples} of page.classes)
    makeClass(label, `${percent(share)}, in ${samples}`, element("classes"));
  page.samples.forEach((sample, index) => {
    const figure = make("figure", "picture", "", element("samples"));
    figure.dataset.index = index;
    const both = make("div", "both", "", figure);
    both.style.aspectRatio = `${sample.width} / ${sample.height}`;
    make("img", "", "", both).alt = sample.title;
    if (sample.mask) make("canvas", "", "", both);
    const caption = make("figcaption", "", sample.title, figure);
    if (sample.note) make("p", "note", sample.note, caption);
    const list = make("div", "", "", caption);
    for (const [label, share] of sample.shares) makeClass(label, percent(share), list);
  });
  const box = element("samples");
  box.addEventListener("pointermove", tellClass);
  box.addEventListener("pointerleave", (event) => tell(event, ""));
  box.addEventListener("click", (event) => event.target.closest(".both")?.classList.toggle("plain"));
  element("find").addEventListener("input", find);
  element("opacity").addEventListener("input", (event) => box.style.setProperty("--opacity", event.target.value));
  find();
  whenNear(box.children, paint);
  document.documentElement.dataset.ready = "1";
}

start();
