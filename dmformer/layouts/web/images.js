// From an image file to the network's input, value by value as dmformer/data/preprocessing.py and Pillow do it.
//
// PNG is decoded here, for what a canvas gives back is rounded where there is transparency, and converted where there is
// a profile. JPEG, WebP, GIF and BMP are decoded by the browser, whose decoders may differ from Pillow's by a little.
// An image is {width, height, channels, data}: one byte a value, three channels in the order RGB or one of luma.

const MOST_PIXELS = 89478485; // Pillow's limit: what has more may be a decompression bomb
const PRECISION_BITS = 32 - 8 - 2; // of the coefficients in Pillow's Resample.c
const FILTERS = {
  bilinear: { support: 1, weight: (x) => (Math.abs(x) < 1 ? 1 - Math.abs(x) : 0) },
  bicubic: {
    support: 2,
    weight(x) {
      const a = -0.5;
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};
// Where a pixel of the upright image is in the one that was stored, by EXIF's orientation; w and h are of the latter.
const TURNS = {
  2: (x, y, w, h) => [w - 1 - x, y],
  3: (x, y, w, h) => [w - 1 - x, h - 1 - y],
  4: (x, y, w, h) => [x, h - 1 - y],
  5: (x, y, w, h) => [y, x],
  6: (x, y, w, h) => [y, h - 1 - x],
  7: (x, y, w, h) => [w - 1 - y, h - 1 - x],
  8: (x, y, w, h) => [w - 1 - y, x],
};

/** Read an image file: upright, with the channels that the network takes. */
export async function readImage(file, preprocessing) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const begins = (text, at = 0) => [...text].every((letter, index) => bytes[at + index] === letter.charCodeAt(0));
  if (begins("\x89PNG\r\n\x1a\n")) return convert(await decodePng(bytes), preprocessing.channels);
  let blob = file, orientation = 1;
  if (begins("\xff\xd8\xff")) ({ blob, orientation } = plainJpeg(bytes));
  else if (!begins("GIF8") && !begins("BM") && !(begins("RIFF") && begins("WEBP", 8))) {
    throw new Error("no image that is read here; expected PNG, JPEG, WebP, GIF or BMP");
  }
  return convert(turn(await decodeInBrowser(blob), orientation), preprocessing.channels);
}

/** Resize and crop an image to what the network sees; of open size where `multiple` is given, nothing is cropped. */
export function fit(image, preprocessing, multiple = 0) {
  const size = preprocessing.image_size;
  const { width, height, box } = target(image, preprocessing, multiple);
  if (Math.max(width, height) > 64 * size) {
    throw new Error(`image of ${image.width}x${image.height} pixels; expected sides no more than 1:64`);
  }
  return crop(resize(image, width, height, preprocessing), box);
}

/** The part of an image that the network sees: left, top, right, bottom in pixels of the image. */
export function visibleBox(image, preprocessing, multiple = 0) {
  const { width, height, box } = target(image, preprocessing, multiple);
  const across = image.width / width, down = image.height / height;
  return [box[0] * across, box[1] * down, box[2] * across, box[3] * down];
}

/** Pixels of images of one size, one after another, as float32 (N, C, H, W) in the network's order of channels. */
export function normalise(pixels, [count, height, width, channels], preprocessing) {
  const order = preprocessing.channels === "BGR" ? [2, 1, 0] : [0, 1, 2].slice(0, channels);
  const tables = order.map((_, channel) => {
    const mean = Math.fround(preprocessing.mean[channel]), std = Math.fround(preprocessing.std[channel]);
    const scaled = (value) => Math.fround(Math.fround(Math.fround(value / 255) - mean) / std);
    return Float32Array.from({ length: 256 }, (_, value) => scaled(value));
  });
  const area = height * width, out = new Float32Array(count * channels * area);
  for (let row = 0; row < count; row++) {
    for (let channel = 0; channel < channels; channel++) {
      const table = tables[channel], from = row * area * channels + order[channel], to = (row * channels + channel) * area;
      for (let pixel = 0; pixel < area; pixel++) out[to + pixel] = table[pixels[from + pixel * channels]];
    }
  }
  return out;
}

function target(image, preprocessing, multiple) {
  const size = preprocessing.image_size, shorter = Math.min(image.width, image.height);
  if (multiple) {
    const scale = size / shorter;
    const side = (length) => Math.max(size, multiple * roundEven((length * scale) / multiple));
    const width = side(image.width), height = side(image.height);
    return { width, height, box: [0, 0, width, height] };
  }
  const scale = roundEven(size / preprocessing.crop_fraction) / shorter;
  const [width, height] = [image.width, image.height].map((length) => Math.max(size, roundEven(length * scale)));
  const left = Math.floor((width - size) / 2), top = Math.floor((height - size) / 2);
  return { width, height, box: [left, top, left + size, top + size] };
}

/** Round as Python does: halves to the even neighbour. */
function roundEven(value) {
  const below = Math.floor(value), rest = value - below;
  return rest > 0.5 || (rest === 0.5 && below % 2) ? below + 1 : below;
}

/** Resize as Pillow's Resample.c: across and down, each with whole coefficients and rounded to a byte. */
function resize(image, width, height, preprocessing) {
  const filter = FILTERS[preprocessing.interpolation];
  const across = (from) => (width === from.width ? from : resizeAcross(from, width, filter));
  const down = (from) => (height === from.height ? from : transpose(resizeAcross(transpose(from), height, filter)));
  return down(across(image));
}

function resizeAcross({ width, height, channels, data }, wanted, filter) {
  const out = new Uint8ClampedArray(wanted * height * channels), columns = coefficients(width, wanted, filter);
  for (let y = 0, to = 0; y < height; y++) {
    for (const { first, weights } of columns) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = 1 << (PRECISION_BITS - 1), from = (y * width + first) * channels + channel;
        for (let at = 0; at < weights.length; at++, from += channels) sum += data[from] * weights[at];
        out[to++] = sum >> PRECISION_BITS; // clamped to 0..255
      }
    }
  }
  return { width: wanted, height, channels, data: out };
}

/** For each place of a row its first source and the weights of that and the following ones, in 2^-22. */
function coefficients(length, wanted, filter) {
  const scale = length / wanted, filterScale = Math.max(scale, 1), support = filter.support * filterScale;
  return Array.from({ length: wanted }, (_, place) => {
    const centre = (place + 0.5) * scale, first = Math.max(0, Math.trunc(centre - support + 0.5));
    const count = Math.min(length, Math.trunc(centre + support + 0.5)) - first, weights = new Float64Array(count);
    let sum = 0;
    for (let at = 0; at < count; at++) sum += weights[at] = filter.weight((at + first - centre + 0.5) * (1 / filterScale));
    const whole = weights.map((weight) => {
      const scaled = (sum === 0 ? weight : weight / sum) * (1 << PRECISION_BITS);
      return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
    });
    return { first, weights: whole };
  });
}

function crop({ width, channels, data }, [left, top, right, bottom]) {
  const rows = new Uint8Array((right - left) * (bottom - top) * channels);
  for (let y = top; y < bottom; y++) {
    const from = (y * width + left) * channels, to = (y * width + right) * channels;
    rows.set(data.subarray(from, to), (y - top) * (right - left) * channels);
  }
  return { width: right - left, height: bottom - top, channels, data: rows };
}

const transpose = (image) => turn(image, 5);

function turn(image, orientation) {
  const place = TURNS[orientation];
  if (!place) return image;
  const { width, height, channels, data } = image;
  const [wide, high] = orientation > 4 ? [height, width] : [width, height];
  const out = new Uint8Array(data.length);
  for (let y = 0, to = 0; y < high; y++) {
    for (let x = 0; x < wide; x++) {
      const [fromX, fromY] = place(x, y, width, height), from = (fromY * width + fromX) * channels;
      for (let channel = 0; channel < channels; channel++) out[to++] = data[from + channel];
    }
  }
  return { width: wide, height: high, channels, data: out };
}

/** Give an image the channels that the network takes: three, or one of luma, by ITU-R 601-2 as Pillow computes it. */
export function convert(image, wanted) {
  const { width, height, channels, data } = image, colours = wanted === "L" ? 1 : 3;
  if (channels === colours) return image;
  const out = new Uint8Array(width * height * colours);
  for (let pixel = 0; pixel < width * height; pixel++) {
    if (colours === 3) out.fill(data[pixel], 3 * pixel, 3 * pixel + 3);
    else out[pixel] = (data[3 * pixel] * 19595 + data[3 * pixel + 1] * 38470 + data[3 * pixel + 2] * 7471 + 0x8000) >> 16;
  }
  return { width, height, channels: colours, data: out };
}

function checkSize(width, height) {
  if (!width || !height || width * height > MOST_PIXELS) {
    throw new Error(`image of ${width}x${height} pixels; expected one to ${MOST_PIXELS}`);
  }
}

// --- what the browser decodes ------------------------------------------------------------------------------------------

async function decodeInBrowser(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error("this browser cannot read the image; expected one that is whole");
  }
  const { width, height } = bitmap;
  checkSize(width, height);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const given = context.getImageData(0, 0, width, height).data, data = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < given.length; from += 4) {
    if (given[from + 3] !== 255) {
      throw new Error("image with transparency, under which browsers give no colours; expected a PNG, or one without");
    }
    data[to++] = given[from];
    data[to++] = given[from + 1];
    data[to++] = given[from + 2];
  }
  return { width, height, channels: 3, data };
}

/** A JPEG without what browsers act upon in different ways: EXIF's orientation, which is returned, and the profile. */
function plainJpeg(bytes) {
  const view = new DataView(bytes.buffer), kept = [bytes.subarray(0, 2)];
  let exif = 0, xmp = 0, at = 2;
  while (at + 4 <= bytes.length && bytes[at] === 0xff) {
    const marker = bytes[at + 1];
    if (marker === 0xff) { at++; continue; } // filling
    const end = at + 2 + view.getUint16(at + 2);
    if (marker === 0xda || end > bytes.length) break; // pixels follow
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker) && bytes[at + 9] === 4) {
      throw new Error("a JPEG of four inks (CMYK), which browsers turn to RGB in different ways; convert it first");
    }
    const content = bytes.subarray(at + 4, end);
    if (marker === 0xe1) {
      exif ||= startsWith(content, "Exif\0\0") ? exifOrientation(content.subarray(6)) : 0;
      xmp ||= startsWith(content, "http://ns.adobe.com/xap/1.0/\0") ? xmpOrientation(content) : 0;
    }
    if (marker !== 0xe1 && marker !== 0xe2) kept.push(bytes.subarray(at, end));
    at = end;
  }
  return { blob: new Blob([...kept, bytes.subarray(at)], { type: "image/jpeg" }), orientation: exif || xmp };
}

const latin1 = (bytes) => new TextDecoder("latin1").decode(bytes);
const startsWith = (bytes, text) => latin1(bytes.subarray(0, text.length)) === text;

/** EXIF's orientation, 0 where there is none, and as with Pillow no error where EXIF is damaged. */
function exifOrientation(bytes) {
  try {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), little = latin1(bytes.subarray(0, 2)) === "II";
    const directory = view.getUint32(4, little), entries = view.getUint16(directory, little);
    for (let entry = 0; entry < entries; entry++) {
      const at = directory + 2 + 12 * entry;
      if (view.getUint16(at, little) !== 0x0112) continue;
      const kind = view.getUint16(at + 2, little), read = { 1: "getUint8", 3: "getUint16", 4: "getUint32" }[kind];
      return read && view.getUint32(at + 4, little) === 1 ? view[read](at + 8, little) : 1;
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
  }
  return 0;
}

const xmpOrientation = (bytes) => Number(/tiff:Orientation(?:="|>)([0-9])/.exec(latin1(bytes))?.[1] ?? 0);

// --- PNG ---------------------------------------------------------------------------------------------------------------

const SAMPLES = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // of a pixel, by the type of colour
const PASSES = [[0, 0, 8, 8], [4, 0, 8, 8], [0, 4, 4, 8], [2, 0, 4, 4], [0, 2, 2, 4], [1, 0, 2, 2], [0, 1, 1, 2]]; // Adam7
const PREDICTORS = [() => 0, (left) => left, (_, up) => up, (left, up) => (left + up) >> 1, paeth];
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/** Decode a PNG file: upright, RGB or grey, transparency dropped. */
async function decodePng(bytes) {
  const { header, palette, compressed, orientation } = readChunks(bytes);
  const { width, height, bits, colour, interlaced } = header;
  if (colour === 0 && bits === 16) throw new Error("image of mode 'I;16'; expected 8 bits a channel: convert it first");
  const perPixel = bits * SAMPLES[colour], passes = interlaced ? PASSES : [[0, 0, 1, 1]];
  const parts = passes.map(([left, top, across, down]) => {
    const wide = Math.ceil((width - left) / across), high = Math.ceil((height - top) / down);
    return { left, top, across, down, wide, high: wide > 0 ? high : 0, row: Math.ceil((wide * perPixel) / 8) };
  });
  const total = parts.reduce((sum, { row, high }) => sum + Math.max(0, high) * (row + 1), 0);
  const raw = await inflate(compressed, total);
  const channels = colour === 2 || colour === 3 || colour === 6 ? 3 : 1, data = new Uint8Array(width * height * channels);
  const image = { width, height, channels, data };
  let at = 0;
  for (const part of parts) {
    let above = new Uint8Array(part.row);
    for (let y = 0; y < part.high; y++, at += part.row + 1) {
      above = unfilter(raw[at], raw.subarray(at + 1, at + 1 + part.row), above, Math.max(1, perPixel >> 3));
      readRow(above, image, header, palette, part, part.top + y * part.down);
    }
  }
  return turn(image, orientation);
}

function readChunks(bytes) {
  const view = new DataView(bytes.buffer), compressed = [], palette = new Uint8Array(768); // black where it is short
  let header = null, exif = 0, xmp = 0;
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at), name = latin1(bytes.subarray(at + 4, at + 8)), end = at + 8 + length;
    if (end + 4 > bytes.length) break;
    const content = bytes.subarray(at + 8, end);
    if (crc(bytes.subarray(at + 4, end)) !== view.getUint32(end)) {
      throw new Error(`damaged PNG: the checksum of ${name} is wrong`);
    }
    if (name === "IHDR") header = readHeader(view, at + 8);
    else if (name === "PLTE") palette.set(content.subarray(0, 768));
    else if (name === "IDAT") compressed.push(content);
    else if (name === "eXIf") exif = exifOrientation(content);
    else if (name === "iTXt" && startsWith(content, "XML:com.adobe.xmp\0")) xmp = xmpOrientation(content);
    else if (name === "IEND") break;
    at = end + 4;
  }
  if (!header || !compressed.length) throw new Error("damaged PNG: no pixels in it");
  return { header, palette, compressed, orientation: exif || xmp };
}

function readHeader(view, at) {
  const [bits, colour, , , interlaced] = [8, 9, 10, 11, 12].map((place) => view.getUint8(at + place));
  const header = { width: view.getUint32(at), height: view.getUint32(at + 4), bits, colour, interlaced };
  checkSize(header.width, header.height);
  const allowed = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] }[colour];
  if (!allowed?.includes(bits)) throw new Error(`damaged PNG: ${bits} bits of colour type ${colour}`);
  return header;
}

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC_TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return ~value >>> 0;
}

async function inflate(parts, length) {
  const out = new Uint8Array(length), reader = new Blob(parts).stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  let at = 0;
  try {
    for (let piece = await reader.read(); !piece.done && at < length; piece = await reader.read()) {
      const fitting = piece.value.subarray(0, length - at);
      out.set(fitting, at);
      at += fitting.length;
    }
  } catch {
    throw new Error("damaged PNG: its pixels cannot be unpacked");
  }
  reader.cancel().catch(() => {});
  if (at < length) throw new Error("damaged PNG: pixels are missing");
  return out;
}

/** Undo the filter of a row of bytes, given the row above. */
function unfilter(kind, row, above, step) {
  const guess = PREDICTORS[kind], out = new Uint8Array(row.length);
  if (!guess) throw new Error(`damaged PNG: a row of filter ${kind}`);
  for (let at = 0; at < row.length; at++) {
    out[at] = row[at] + (at < step ? guess(0, above[at], 0) : guess(out[at - step], above[at], above[at - step]));
  }
  return out;
}

function paeth(left, up, corner) {
  const guess = left + up - corner;
  const fromLeft = Math.abs(guess - left), fromUp = Math.abs(guess - up), fromCorner = Math.abs(guess - corner);
  if (fromLeft <= fromUp && fromLeft <= fromCorner) return left;
  return fromUp <= fromCorner ? up : corner;
}

/** Put the pixels of a row into the image: of 16 bits the upper eight, of fewer all of the range. */
function readRow(row, { width, channels, data }, { bits, colour }, palette, { left, across, wide }, y) {
  const most = (1 << bits) - 1, bytes = bits >> 3, samples = SAMPLES[colour];
  for (let x = 0; x < wide; x++) {
    const to = (y * width + left + x * across) * channels, bit = x * bits;
    const value = bits < 8 ? (row[bit >> 3] >> (8 - bits - (bit & 7))) & most : row[x * samples * bytes];
    if (colour === 3) for (let channel = 0; channel < 3; channel++) data[to + channel] = palette[3 * value + channel];
    else if (channels === 1) data[to] = bits < 8 ? (value * 255) / most : value;
    else for (let channel = 0; channel < 3; channel++) data[to + channel] = row[(x * samples + channel) * bytes];
  }
}
