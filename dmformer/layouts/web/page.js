// The page: an image in, classes or coloured pixels out; and the golden answers asked for once more.
// Texts of the bundle go into the page by textContent alone.

import { check, classOf, isAlone, logit, short } from "./checks.js";
import { convert, fit, normalise, readImage, visibleBox } from "./images.js";

const ENGINE = new URL("./onnxruntime-web/", import.meta.url);
const LEAST_SIDE = 480; // pixels of the picture's shorter side: a small image is enlarged
const at = (id) => document.getElementById(id);
const breathe = () => new Promise((resume) => setTimeout(resume)); // the browser draws what was written

let page, engine, lastFile;
let opened = { name: null, session: null };
let turn = Promise.resolve(); // one inference at a time

// --- the network -------------------------------------------------------------------------------------------------------

async function read(path, kind = "arrayBuffer") {
  const fail = () => {
    throw new Error(`${path}: the server does not answer, or sends something else; expected the file`);
  };
  const answer = await fetch(new URL(path, import.meta.url)).catch(fail);
  if (!answer.ok) throw new Error(`${path}: the server answers ${answer.status}; expected the file`);
  return answer[kind]().catch(fail);
}

async function startEngine() {
  engine = await import("./onnxruntime-web/ort.wasm.min.js");
  engine.env.wasm.wasmPaths = { mjs: new URL("ort-wasm-simd-threaded.js", ENGINE).href };
  engine.env.wasm.wasmBinary = await read("onnxruntime-web/ort-wasm-simd-threaded.wasm");
  engine.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  engine.env.logLevel = "error";
}

/** Open a model, after comparing its file with its hash where the browser can. */
async function open(model) {
  if (opened.name === model.name) return opened;
  await opened.session?.release();
  opened = { name: null, session: null };
  const bytes = await readChecked(model.file);
  const session = await engine.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  opened = { name: model.name, session };
  return opened;
}

async function run(session, values, shape) {
  await breathe();
  const outputs = await session.run({ [page.input]: new engine.Tensor("float32", values, shape) });
  return Object.fromEntries(
    Object.entries(outputs).map(([name, { dims, type, data }]) => [name, { shape: [...dims], type, data }]),
  );
}

/** Read a file that the layout lists, and compare its hash where the browser can. */
async function readChecked(file) {
  const bytes = await read(file.path);
  if (!crypto.subtle) return bytes;
  const digest = [...new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))];
  const sha256 = digest.map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (sha256 === file.sha256) return bytes;
  throw Object.assign(
    new Error(`SHA-256 ${sha256.slice(0, 12)}…; expected ${file.sha256.slice(0, 12)}…: the file was changed or damaged`),
    { stage: "integrity" },
  );
}

const chosen = () => page.models[at("model").selectedIndex];
const multiple = () => (page.task === "segmentation" && page.open_size ? page.multiple : 0);

// --- an image ----------------------------------------------------------------------------------------------------------

async function look(file) {
  lastFile = file;
  say("said", `${file.name}: …`);
  at("shown").hidden = at("classes").hidden = true;
  await breathe();
  const { session } = await open(chosen());
  const image = await readImage(file, page.preprocessing);
  const seen = fit(image, page.preprocessing, multiple());
  const values = normalise(seen.data, [1, seen.height, seen.width, seen.channels], page.preprocessing);
  const started = performance.now();
  const { [page.output]: logits } = await run(session, values, [1, seen.channels, seen.height, seen.width]);
  const took = performance.now() - started;
  if (!logits.data.every(Number.isFinite)) throw new Error("the network answers with NaN or infinity; expected numbers");
  if (page.task === "classification") showClasses(logits);
  else showPixels(image, logits);
  say("said", `${file.name}, ${image.width} × ${image.height} pixels: answered in ${Math.round(took)} ms`);
}

const nameOf = (index) => page.classes[index] ?? `class ${index}`;
const percent = (share, digits) => `${(100 * share).toFixed(digits)} %`;

function showClasses({ shape: [, channels], data }) {
  const count = isAlone(channels, 1) ? 2 : channels;
  const logits = Array.from({ length: count }, (_, index) => logit(data, 0, 0, channels, 1, index));
  const largest = Math.max(...logits), scaled = logits.map((value) => Math.exp(value - largest));
  const sum = scaled.reduce((one, other) => one + other, 0);
  const best = scaled.map((value, index) => [value / sum, index]).sort((one, other) => other[0] - one[0] || one[1] - other[1]);
  const rows = best.slice(0, 5).map(([probability, index]) => {
    const bar = Object.assign(document.createElement("meter"), { value: probability });
    bar.setAttribute("aria-hidden", "true");
    return [nameOf(index), { text: percent(probability, 2), class: "number" }, { nodes: [bar] }];
  });
  fill("classes", "The most likely classes", ["class", "probability", ""], rows);
}

function showPixels(image, { shape: [, channels, height, width], data }) {
  const labels = new Uint16Array(height * width), counts = new Map();
  for (let place = 0; place < labels.length; place++) {
    const label = classOf(data, 0, place, channels, labels.length);
    labels[place] = label;
    counts.set(label, (counts.get(label) ?? 0) + 1);
  }
  const order = [...counts].sort((one, other) => other[1] - one[1] || one[0] - other[0]);
  draw(image, labels, width, height);
  const words = order.map(([label, count]) => `${nameOf(label)} ${percent(count / labels.length, 1)}`);
  at("picture").setAttribute("aria-label", `The image with its pixels' classes in colour: ${words.join(", ")}`);
  at("shown").hidden = false;
  const rows = order.map(([label, count]) => {
    const swatch = Object.assign(document.createElement("span"), { className: "swatch" });
    swatch.style.backgroundColor = `rgb(${page.colours[label].join(",")})`;
    return [{ nodes: [swatch, nameOf(label)] }, { text: percent(count / labels.length, 1), class: "number" }];
  });
  fill("classes", "Classes of the pixels that the network saw", ["class", "share"], rows);
}

/** Draw the image, dark where the network did not see it, and its labels' colours over it. */
function draw(image, labels, width, height) {
  const canvas = at("picture"), context = canvas.getContext("2d");
  const scale = Math.max(1, LEAST_SIDE / Math.min(image.width, image.height));
  [canvas.width, canvas.height] = [Math.round(image.width * scale), Math.round(image.height * scale)];
  const [left, top, right, bottom] = visibleBox(image, page.preprocessing, multiple()).map((edge) => Math.round(edge * scale));
  context.drawImage(canvasOf(image), 0, 0, canvas.width, canvas.height);
  context.fillStyle = "black";
  context.globalAlpha = 1 - page.dimmed;
  context.beginPath();
  context.rect(0, 0, canvas.width, canvas.height);
  context.rect(left, top, right - left, bottom - top);
  context.fill("evenodd");
  context.globalAlpha = page.opacity;
  context.imageSmoothingEnabled = false;
  const colours = new Uint8Array(3 * labels.length);
  labels.forEach((label, index) => colours.set(page.colours[label], 3 * index));
  context.drawImage(canvasOf({ width, height, channels: 3, data: colours }), left, top, right - left, bottom - top);
  context.globalAlpha = 1;
}

function canvasOf({ width, height, channels, data }) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pixels = new ImageData(width, height);
  for (let index = 0; index < width * height; index++) {
    for (let channel = 0; channel < 3; channel++) {
      pixels.data[4 * index + channel] = data[index * channels + (channel % channels)];
    }
    pixels.data[4 * index + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// --- the golden answers ------------------------------------------------------------------------------------------------

async function verify() {
  const model = chosen(), rows = [];
  say("verdict", "asking …");
  list("skipped", [...page.skipped, ...(crypto.subtle ? [] : [NO_HASHES])]);
  const show = (row) => {
    rows.push(row);
    fill("checks", `${model.title}, in onnxruntime-web ${page.engine} in this browser`, CHECK_COLUMNS, rows.map(checkCells));
  };
  const shown = async (file, work) => {
    const row = { stage: "integrity", batch: null, against: "layout.json", limit: null, largest: null, passed: true, reason: file.path };
    try {
      const done = await work();
      if (crypto.subtle) show(row);
      return done;
    } catch (error) {
      show({ ...row, stage: error.stage ?? "runtime", passed: false, reason: `${file.path}: ${error?.message ?? error}` });
      return null;
    }
  };
  const golden = await shown(page.golden.file, readGolden);
  const ready = golden && (await shown(model.file, () => open(model)));
  if (ready) {
    const pixels = {
      see: (image) => fit(convert(image, page.preprocessing.channels), page.preprocessing),
      normalise: (values, shape) => normalise(values, shape, page.preprocessing),
    };
    await check({ page, model, golden, session: ready.session, run, pixels, show });
  }
  const failed = rows.filter((row) => !row.passed);
  if (!failed.length) say("verdict", `all ${rows.length} checks held`, "good");
  else say("verdict", `${failed.length} of ${rows.length} checks failed; first: ${failed[0].stage}: ${failed[0].reason}`, "bad");
}

const NO_HASHES = "hashes: this browser compares them on pages of https and of localhost only";
const CHECK_COLUMNS = ["", "stage", "batch", "against", "max abs", "limit", "remark"];

function checkCells({ stage, batch, against, limit, largest, passed, reason }) {
  const verdict = { text: passed ? "ok" : "FAILED", class: passed ? "good" : "bad" };
  const number = (value) => ({ text: value === null ? "" : short(value), class: "number" });
  return [verdict, stage, number(batch), against, number(largest), number(limit), { text: reason ?? "", class: "text" }];
}

async function readGolden() {
  const bytes = await readChecked(page.golden.file), kinds = { float32: Float32Array, uint8: Uint8Array };
  const arrays = ({ dtype, shape, offset }) =>
    new kinds[dtype](bytes, offset, shape.reduce((one, other) => one * other, 1));
  return { ...page.golden, arrays };
}

// --- what is shown -----------------------------------------------------------------------------------------------------

function say(id, text, kind = "") {
  Object.assign(at(id), { textContent: text, className: kind });
}

function list(id, lines) {
  at(id).replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
}

/** Fill a table; a cell is a text, or {text or nodes, class}. */
function fill(id, title, columns, rows) {
  const table = at(id), line = (kind, cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => {
      const made = document.createElement(kind), { text, nodes, class: name = "" } = typeof cell === "string" ? { text: cell } : cell;
      made.className = name;
      made.append(...(nodes ?? [text]));
      return made;
    }));
    return row;
  };
  table.replaceChildren(Object.assign(document.createElement("caption"), { textContent: title }));
  table.append(line("th", columns), ...rows.map((cells) => line("td", cells)));
  table.hidden = false;
}

/** Do one thing after another, and say in the page what went wrong. */
function inTurn(id, work) {
  turn = turn.then(work).catch((error) => say(id, String(error?.message ?? error), "bad"));
  return turn;
}

async function start() {
  if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, which the network runs in; expected another browser");
  page = await read("layout.json", "json");
  document.title = at("title").textContent = page.title;
  at("about").textContent = page.about;
  at("model").append(...page.models.map(({ title }) => Object.assign(document.createElement("option"), { textContent: title })));
  at("choice").hidden = page.models.length < 2;
  say("status", "loading the engine …");
  await startEngine();
  say("status", "");
  at("main").hidden = false;
  at("file").addEventListener("change", ({ target }) => target.files[0] && inTurn("said", () => look(target.files[0])));
  at("model").addEventListener("change", () => lastFile && inTurn("said", () => look(lastFile)));
  at("verify").addEventListener("click", () => inTurn("verdict", verify));
  for (const kind of ["dragover", "dragleave", "drop"]) document.addEventListener(kind, drag);
}

function drag(event) {
  event.preventDefault();
  at("drop").classList.toggle("over", event.type === "dragover");
  const file = event.type === "drop" && event.dataTransfer.files[0];
  if (file) inTurn("said", () => look(file));
}

start().catch((error) => say("status", String(error?.message ?? error), "bad"));
