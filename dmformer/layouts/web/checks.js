// The golden answers asked for in this browser: rows, limits and verdicts as `dmformer verify` has them
// (dmformer/verify/parity.py, answers.py, compare.py). The limits were made there, and are read from layout.json.

const EQUAL = {
  rows: "identical rows of a batch",
  shuffled: "the same rows in another order",
  repeated: "the same rows asked twice",
  batches: "the same rows alone and in a batch",
};

/** Make every check, and give each row to `show` when it is made. */
export async function check({ page, model, golden, session, run, pixels, show }) {
  for (const row of checkPreprocessing(page, golden, pixels)) show(row);
  const asker = new Asker(page, golden, session, run);
  let answers;
  try {
    answers = await asker.ask();
  } catch (error) {
    answers = { failed: String(error?.message ?? error) };
  }
  for (const row of checkAnswers("runtime", answers, golden.batches, model.references, golden)) show(row);
  if (!answers.failed) for (const row of checkConsistency(answers, model.references)) show(row);
  if (golden.other) {
    const { size, inputs } = golden.other, failed = answers.failed ?? answers.otherFailed;
    const there = { failed, byBatch: { [inputs.shape[0]]: answers.other } };
    for (const row of checkAnswers(`runtime at ${size}`, there, [inputs.shape[0]], model.other_references, golden)) show(row);
  }
  show(checkDecisions(page, answers, golden, model.references[0]));
}

// --- asking ------------------------------------------------------------------------------------------------------------

class Asker {
  constructor(page, golden, session, run) {
    Object.assign(this, { page, golden, session, run });
  }

  async ask() {
    const { golden } = this, inputs = golden.arrays(golden.inputs), count = golden.inputs.shape[0], byBatch = {};
    const sizes = golden.batches, largest = sizes.at(-1), middle = sizes[Math.floor(sizes.length / 2)];
    const all = [...Array(count).keys()];
    for (const batch of [...sizes].reverse()) byBatch[batch] = await this.rows(golden.inputs, inputs, all, batch);
    const order = [0, ...all.slice(1).reverse()];
    const differences = {
      rows: apartFromFirst(await this.rows(golden.inputs, inputs, Array(largest).fill(0), largest)),
      shuffled: apart(await this.rows(golden.inputs, inputs, order, largest), picked(byBatch[largest], order)),
      repeated: 0,
    };
    const asked = [...Array(middle).keys()].map((row) => row % count), before = asked.slice(0, Math.min(middle, count));
    for (let time = 0; time < 2; time++) {
      const again = await this.rows(golden.inputs, inputs, asked, middle);
      differences.repeated = Math.max(differences.repeated, apart(picked(again, before), picked(byBatch[middle], before)));
    }
    if (sizes.length > 1) differences.batches = apart(byBatch[largest], byBatch[sizes[0]]);
    const answers = { byBatch, differences };
    if (golden.other) {
      const array = golden.other.inputs, rows = [...Array(array.shape[0]).keys()];
      try {
        answers.other = await this.rows(array, golden.arrays(array), rows, rows.length, golden.other.strides);
      } catch (error) {
        answers.otherFailed = String(error?.message ?? error);
      }
    }
    return answers;
  }

  /** Run rows of an array in batches of one size, the last filled up from the start; keep what golden answers keep. */
  async rows(array, values, rows, batch, strides = this.golden.strides) {
    const length = values.length / array.shape[0], parts = {};
    for (let start = 0; start < rows.length; start += batch) {
      const given = new Float32Array(batch * length);
      for (let index = 0; index < batch; index++) {
        const row = rows[(start + index) % rows.length];
        given.set(values.subarray(row * length, (row + 1) * length), index * length);
      }
      const outputs = await this.run(this.session, given, [batch, ...array.shape.slice(1)]);
      for (const [name, output] of Object.entries(outputs)) (parts[name] ??= []).push(thinned(output, strides[name] ?? 1));
    }
    return Object.fromEntries(Object.entries(parts).map(([name, batches]) => [name, joined(batches, rows.length)]));
  }
}

function thinned({ shape, type, data }, stride) {
  if (shape.length !== 4 || stride === 1) return { shape, type, data };
  const [count, channels, height, width] = shape, high = Math.ceil(height / stride), wide = Math.ceil(width / stride);
  const out = new Float32Array(count * channels * high * wide);
  let to = 0;
  for (let map = 0; map < count * channels; map++) {
    for (let y = 0; y < height; y += stride) {
      for (let x = 0; x < width; x += stride) out[to++] = data[(map * height + y) * width + x];
    }
  }
  return { shape: [count, channels, high, wide], type, data: out };
}

function joined(batches, count) {
  const [{ shape, type }] = batches, length = shape.slice(1).reduce((one, other) => one * other, 1);
  const data = new Float32Array(count * length);
  batches.forEach((batch, index) => {
    const first = index * shape[0], rows = Math.min(batch.shape[0], count - first);
    data.set(batch.data.subarray(0, rows * length), first * length);
  });
  return { shape: [count, ...shape.slice(1)], type, data };
}

function picked(outputs, rows) {
  return Object.fromEntries(Object.entries(outputs).map(([name, { shape, type, data }]) => {
    const length = data.length / shape[0], out = new Float32Array(rows.length * length);
    rows.forEach((row, index) => out.set(data.subarray(row * length, (row + 1) * length), index * length));
    return [name, { shape: [rows.length, ...shape.slice(1)], type, data: out }];
  }));
}

// --- comparing ---------------------------------------------------------------------------------------------------------

/** The largest difference between two values at the same place; NaN where one is. */
function largestDifference(one, other) {
  let largest = 0;
  for (let at = 0; at < one.length; at++) {
    const distance = Math.abs(one[at] - other[at]);
    if (!(distance <= largest)) largest = distance;
    if (Number.isNaN(largest)) break;
  }
  return largest;
}

function apart(outputs, expected) {
  return Math.max(...Object.keys(expected).map((name) => largestDifference(outputs[name].data, expected[name].data)));
}

function apartFromFirst(outputs) {
  const rows = Object.values(outputs)[0].shape[0];
  return apart(outputs, picked(outputs, Array(rows).fill(0)));
}

function row(stage, batch, against, limit, fields) {
  return { stage, batch, against, limit: limit?.max_abs ?? null, source: limit?.source ?? null, largest: null, reason: null, ...fields };
}

function checkPreprocessing(page, golden, pixels) {
  const exact = { max_abs: 0, source: "pixels are whole numbers" }, rows = [];
  let differing = 0, largest = 0, values = 0, reason = null;
  try {
    golden.sources.forEach((source, index) => {
      const [height, width, channels] = source.shape;
      const seen = pixels.see({ width, height, channels, data: golden.arrays(source) });
      const expected = golden.arrays(golden.source_pixels), length = expected.length / golden.sources.length;
      if (seen.data.length !== length) throw new Error(`${seen.data.length} pixel values; expected ${length}`);
      for (let at = 0; at < length; at++) {
        const distance = Math.abs(seen.data[at] - expected[index * length + at]);
        if (distance) differing++;
        largest = Math.max(largest, distance);
      }
      values += length;
    });
    if (!values) reason = "there are no golden source images; export the bundle again";
    else if (differing) reason = `${differing} of ${values} pixel values differ, by up to ${largest} of 255`;
  } catch (error) {
    reason = `the golden source images cannot be preprocessed: ${error.message}`;
  }
  rows.push(row("pixels", golden.sources.length, "training", exact, { passed: !reason, largest, reason }));
  const given = pixels.normalise(golden.arrays(golden.images), golden.images.shape);
  const compared = compare({ shape: golden.inputs.shape, type: "float32", data: given }, golden, golden.inputs, golden.limit);
  rows.push(row("preprocessing", golden.images.shape[0], "training", golden.limit, compared));
  return rows;
}

function checkAnswers(stage, answers, batches, references, golden) {
  return references.flatMap((reference) => batches.map((batch) => {
    const names = Object.keys(reference.outputs), limits = names.map((name) => reference.limits[name]);
    if (answers.failed) {
      const widest = limits.reduce((one, other) => (other.max_abs > one.max_abs ? other : one));
      return row(stage, batch, reference.name, widest, { passed: false, reason: answers.failed });
    }
    const answered = answers.byBatch[batch], found = Object.keys(answered).sort(), expected = [...names].sort();
    if (found.join() !== expected.join()) {
      return row(stage, batch, reference.name, limits[0], { passed: false, reason: `outputs ${found}; expected ${expected}` });
    }
    const rows = names.map((name) => {
      const limit = reference.limits[name];
      return row(stage, batch, reference.name, limit, compare(answered[name], golden, reference.outputs[name], limit));
    });
    const margin = (one) => (one.passed ? 1 : 0) - (one.largest ?? 0) / one.limit / 1e9; // the failed first, then the nearest
    return rows.reduce((one, other) => (margin(other) < margin(one) ? other : one));
  }));
}

function compare(candidate, golden, array, limit) {
  const expected = golden.arrays(array), fail = (reason) => ({ passed: false, reason });
  if (candidate.shape.join() !== array.shape.join()) return fail(`output of shape (${candidate.shape}); expected (${array.shape})`);
  if (candidate.type !== "float32") return fail(`output of type ${candidate.type}; expected float32`);
  const broken = candidate.data.reduce((count, value) => count + (Number.isFinite(value) ? 0 : 1), 0);
  if (broken) return fail(`${broken} of ${candidate.data.length} output values are NaN or infinite`);
  const largest = largestDifference(candidate.data, expected), passed = largest <= limit.max_abs;
  return { passed, largest, reason: passed ? null : `differs by ${short(largest)}, limit ${short(limit.max_abs)}` };
}

function checkConsistency(answers, references) {
  const widest = references.map(({ limits }) => Object.values(limits).reduce((a, b) => (b.max_abs > a.max_abs ? b : a)));
  const limit = widest.reduce((a, b) => (b.max_abs < a.max_abs ? b : a));
  const batch = Math.max(...Object.keys(answers.byBatch).map(Number));
  return Object.entries(answers.differences).map(([kind, distance]) => {
    const passed = distance <= limit.max_abs, largest = Number.isFinite(distance) ? distance : null;
    const reason = passed ? null : `${EQUAL[kind]} get answers that are ${short(distance)} apart`;
    return row(kind, batch, "itself", limit, { passed, largest, reason });
  });
}

function checkDecisions(page, answers, golden, reference) {
  const [name] = Object.keys(reference.outputs), array = reference.outputs[name], limit = reference.limits[name];
  const count = array.shape[0], fail = (reason) => row("decisions", count, "PyTorch", limit, { passed: false, reason });
  if (answers.failed) return fail(answers.failed);
  const answered = answers.byBatch[golden.batches.at(-1)][name];
  if (answered?.shape.join() !== array.shape.join() || !answered.data.every(Number.isFinite)) {
    return fail("answers of another shape, or NaN or infinite, decide nothing");
  }
  const expected = golden.arrays(array), [, channels] = array.shape, places = expected.length / count / channels;
  let flips = 0, serious = 0, worst = 0, example = "";
  for (let image = 0; image < count; image++) {
    for (let place = 0; place < places; place++) {
      const wanted = classOf(expected, image, place, channels, places), chosen = classOf(answered.data, image, place, channels, places);
      if (wanted === chosen) continue;
      const margin = logit(expected, image, place, channels, places, wanted) - logit(expected, image, place, channels, places, chosen);
      flips++;
      if (margin > 2 * limit.max_abs) serious++;
      if (margin >= worst) [worst, example] = [margin, `image ${image}: class ${chosen} for ${wanted}`];
    }
  }
  const what = page.task === "segmentation" ? "pixels" : "images";
  const reason = flips
    ? `${flips} of ${count * places} ${what} get another class; ${example}, which PyTorch prefers by ${short(worst)}; ` +
      `noise explains ${short(2 * limit.max_abs)}`
    : null;
  return row("decisions", count, "PyTorch", limit, { passed: !serious, reason });
}

/** A logit of a place: a pixel, or the image. A classifier's only output tells two classes apart: the first has 0. */
export function logit(data, image, place, channels, places, index) {
  if (isAlone(channels, places)) return index ? data[image] : 0;
  return data[(image * channels + index) * places + place];
}

export const isAlone = (channels, places) => channels === 1 && places === 1;

/** The class with the largest logit; ties go to the lower one. */
export function classOf(data, image, place, channels, places) {
  let best = 0, largest = logit(data, image, place, channels, places, 0);
  const classes = isAlone(channels, places) ? 2 : channels;
  for (let index = 1; index < classes; index++) {
    const value = logit(data, image, place, channels, places, index);
    if (value > largest) [best, largest] = [index, value];
  }
  return best;
}

/** Three digits, as Python's :.3g. */
export function short(value) {
  if (value === null || !Number.isFinite(value)) return String(value ?? "");
  const rounded = Number(value.toPrecision(3)), size = Math.abs(rounded);
  return size && (size < 1e-4 || size >= 1000) ? rounded.toExponential().replace(/e([+-])(\d)$/, "e$10$2") : String(rounded);
}
