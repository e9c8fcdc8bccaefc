"use strict";

// Compute a network that images/page.py describes, and explain its values. Nothing here draws.
//
// A layer has a name, operations, the shapes `before` and `after` it, and `windows`, which connect
// them. A value is {layer, i}, where i is the index in the flattened output of the layer.

const sum = numbers => numbers.reduce((total, number) => total + number, 0);
const argmax = values => values.indexOf(Math.max(...values));
const maxAbs = values => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
const clamp = (number, low, high) => Math.min(high, Math.max(low, number));
const count = (length, make) => Array.from({length}, (_, i) => make(i));

// --- Shapes and windows --------------------------------------------------------------------------

// A shape without the batch dimension, as in PyTorch. Units are maps of one value.
function shapeOf([maps, height = 1, width = 1]) {
  return {maps, height, width, area: height * width, size: maps * height * width};
}

const [PAD, IMAGE, INPUT] = [280, 28, 32].map(side => shapeOf([1, side, side]));

function coordinates({area, width}, i) {
  return {map: Math.floor(i / area), row: Math.floor((i % area) / width), column: i % width};
}

const indexOf = ({height, width}, map, row, column) => (map * height + row) * width + column;

// How a layer sees the one before. Each output map sees `seen` input maps, and `sharing` output
// maps see the same ones. For each output position, `places` lists where its window lies in an
// input map, in the order of the kernel's weights; -1 is padding. A linear layer sees maps of one
// value, and does not slide over them.
function windowsOf({operations: [{op, attributes}], before, after}) {
  const one = {kernel: [1, 1], places: Int32Array.of(0), mapArea: 1, slides: false};
  if (op === "linear") return {...one, seen: before.size, sharing: after.maps};
  const {kernel_size: kernel, stride, dilation = [1, 1]} = attributes;
  const {groups = op === "conv2d" ? 1 : after.maps} = attributes;
  const named = {valid: [0, 0], same: kernel.map((n, axis) => (dilation[axis] * (n - 1)) >> 1)};
  const padding = named[attributes.padding] ?? attributes.padding ?? [0, 0];
  const place = (axis, position, k) => position * stride[axis] - padding[axis] + k * dilation[axis];
  const places = [];
  for (let row = 0; row < after.height; row++)
    for (let column = 0; column < after.width; column++)
      for (let y = 0; y < kernel[0]; y++)
        for (let x = 0; x < kernel[1]; x++) {
          const down = place(0, row, y), across = place(1, column, x);
          const inside = down >= 0 && down < before.height && across >= 0 && across < before.width;
          places.push(inside ? indexOf(before, 0, down, across) : -1);
        }
  const [seen, sharing] = [before.maps / groups, after.maps / groups];
  const shared = {mapArea: before.area, slides: true};
  return {kernel, seen, sharing, places: Int32Array.from(places), ...shared};
}

// Where value i comes from: for each input map that it sees, the map and its window.
function sourcesOf({windows: {kernel, seen, sharing, places, mapArea}, after}, i) {
  const first = Math.floor(i / after.area / sharing) * seen, length = kernel[0] * kernel[1];
  const window = places.slice((i % after.area) * length, (i % after.area + 1) * length);
  return count(seen, n => ({
    map: first + n,
    indices: [...window].map(place => (place < 0 ? -1 : (first + n) * mapArea + place)),
  }));
}

// From which values a value is computed: for its layer and each one before, a box of rows and
// columns, which is the same in all maps from `first` to `last`.
function receptiveField(layers, {layer, i}) {
  const {map, row, column} = coordinates(layer.after, i), boxes = [];
  boxes[layer.index] = {first: map, last: map, top: row, left: column, height: 1, width: 1};
  for (let k = layer.index; k > 0; k--) {
    const {before, after, windows: {kernel, seen, sharing, places, slides}} = layers[k];
    const {first, last, top, left, height, width} = boxes[k], source = layers[k - 1].after;
    boxes[k - 1] = {first: 0, last: source.maps - 1, top: 0, left: 0, ...source};
    if (!slides || before.height !== source.height) continue; // it sees all, or maps are reshaped
    const marks = new Uint8Array(before.area), length = kernel[0] * kernel[1];
    for (let y = top; y < top + height; y++) {
      const start = indexOf(after, 0, y, left) * length;
      for (let n = start; n < start + width * length; n++) if (places[n] >= 0) marks[places[n]] = 1;
    }
    const [from, to] = [first, last].map(n => Math.floor(n / sharing) * seen);
    boxes[k - 1] = {first: from, last: to + seen - 1, ...boundingBox(before, marks)};
  }
  return boxes;
}

// The smallest box around all values of a map that are not 0. It may be empty.
function boundingBox({height, width}, values) {
  let [top, bottom, left, right] = [height, -1, width, -1];
  for (let i = 0; i < values.length; i++) {
    if (!values[i]) continue;
    const row = Math.floor(i / width), column = i % width;
    [top, bottom] = [Math.min(top, row), row];
    [left, right] = [Math.min(left, column), Math.max(right, column)];
  }
  return bottom < 0 ? {top: 0, left: 0, height: 0, width: 0}
    : {top, left, height: bottom - top + 1, width: right - left + 1};
}

// --- The forward pass ----------------------------------------------------------------------------

function weightedSums(x, {values: {weight, bias}}, {windows, after}) {
  const {kernel, seen, sharing, places, mapArea} = windows, length = kernel[0] * kernel[1];
  const output = new Float64Array(after.size);
  for (let i = 0; i < after.size; i++) {
    const map = Math.floor(i / after.area), first = Math.floor(map / sharing) * seen;
    const start = (i % after.area) * length;
    let total = bias ? bias[map] : 0, w = map * seen * length;
    for (let n = first; n < first + seen; n++)
      for (let k = start; k < start + length; k++, w++)
        if (places[k] >= 0) total += weight[w] * x[n * mapArea + places[k]];
    output[i] = total;
  }
  return output;
}

function pooling(combine) {
  return (x, _, {windows: {kernel, places, mapArea}, after}) => {
    const length = kernel[0] * kernel[1], output = new Float64Array(after.size);
    for (let i = 0; i < after.size; i++) {
      const offset = Math.floor(i / after.area) * mapArea, start = (i % after.area) * length;
      const values = [];
      for (let k = start; k < start + length; k++)
        if (places[k] >= 0) values.push(x[offset + places[k]]);
      output[i] = combine(values, length);
    }
    return output;
  };
}

// Other operations compute each value from one value, `x` in their formula. The other names in it
// are numbers of the operation.
const FORMULAS = {
  add: ["x + other", ({x, other}) => x + other],
  sub: ["x − other", ({x, other}) => x - other],
  mul: ["x × other", ({x, other}) => x * other],
  div: ["x ÷ other", ({x, other}) => x / other],
  sigmoid: ["sigmoid(x)", ({x}) => 1 / (1 + Math.exp(-x))],
  tanh: ["tanh(x)", ({x}) => Math.tanh(x)],
  relu: ["relu(x)", ({x}) => Math.max(0, x)],
  leaky_relu: ["leaky relu(x)", ({x, negative_slope = 0.01}) => (x > 0 ? x : negative_slope * x)],
  softmax: ["softmax: e^(x − best) ÷ total", ({x, best, total}) => Math.exp(x - best) / total],
  log_softmax: ["log softmax: log(e^(x − best) ÷ total)",
    ({x, best, total}) => x - best - Math.log(total)],
  batch_norm: ["(x − running_mean) ÷ std × weight + bias",
    ({x, running_mean, std, weight, bias}) => ((x - running_mean) / std) * weight + bias],
  input: ["(pixel x ÷ 255 − mean) ÷ std", ({x, mean, std}) => (x / 255 - mean) / std],
};

// The numbers in the formula of an operation for value i of `inputs`. A tensor has one number for
// each map.
function numbersOf({op, attributes, values}, inputs, i) {
  const numbers = {x: inputs[i], ...attributes};
  for (const [name, tensor] of Object.entries(values))
    numbers[name] = tensor[Math.floor((i * tensor.length) / inputs.length)];
  if (op === "batch_norm") {
    const {running_var, eps = 1e-5, weight = 1, bias = 0} = numbers;
    return {...numbers, weight, bias, std: Math.sqrt(running_var + eps)};
  }
  if (!/softmax/.test(op)) return numbers;
  const best = Math.max(...inputs);
  return {...numbers, best, total: sum(inputs.map(value => Math.exp(value - best)))};
}

const OPERATIONS = {
  conv2d: weightedSums,
  linear: weightedSums,
  avg_pool2d: pooling((values, length) => sum(values) / length), // as in PyTorch, padding counts
  max_pool2d: pooling(values => Math.max(...values)),
};
for (const [op, [, compute]] of Object.entries(FORMULAS))
  OPERATIONS[op] = (inputs, operation) => {
    const shared = numbersOf(operation, inputs, 0), {length} = Object.keys(operation.values);
    return inputs.map((x, i) => {
      const numbers = length ? numbersOf(operation, inputs, i) : shared;
      numbers.x = x;
      return compute(numbers);
    });
  };

const SOFTMAX = {op: "softmax", attributes: {}, values: {}};

// The results of all operations, for each layer in turn; the last one is the layer's output. The
// image (28x28, 0 to 255; null: black) is padded. Operations that do nothing at evaluation, such as
// dropout, are skipped.
function forward({layers}, image) {
  let x = new Float64Array(INPUT.size);
  image?.forEach((value, i) => {
    const {row, column} = coordinates(IMAGE, i);
    x[indexOf(INPUT, 0, row + 2, column + 2)] = value;
  });
  return layers.map(layer => layer.operations.map(operation => {
    x = OPERATIONS[operation.op]?.(x, operation, layer) ?? x;
    return x;
  }));
}

function probabilities({layers}, steps) {
  const output = steps.at(-1).at(-1);
  return layers.at(-1).operations.at(-1).op === "softmax" ? output
    : OPERATIONS.softmax(output, SOFTMAX);
}

// --- Networks and their epochs -------------------------------------------------------------------

// Complete the description of a network. `arrays` maps names to typed arrays.
function makeNetwork(description, arrays) {
  const net = {...description, arrays, final: description.epochs.length - 1};
  net.layers.forEach((layer, index) => {
    Object.assign(layer, {index, before: shapeOf(layer.input), after: shapeOf(layer.output)});
    layer.decimals = decimalsOf(layer.range);
    layer.explained = [...layer.operations];
    if (index) layer.windows = windowsOf(layer);
  });
  const {explained} = net.layers.at(-1);
  if (!/softmax/.test(explained.at(-1).op)) explained.push(SOFTMAX);
  net.layers[0].operations[0].attributes = {mean: net.mean, std: net.std};
  const all = arrays.images.length / IMAGE.size;
  net.images = count(all, n => ({
    image: arrays.images.subarray(IMAGE.size * n, IMAGE.size * (n + 1)),
    label: arrays.classes[n], // in the first row; the others have the answers in each epoch
    answers: net.epochs.map((_, epoch) => arrays.classes[(epoch + 1) * all + n]),
    logits: arrays.logits.subarray(net.classes.length * n, net.classes.length * (n + 1)),
  }));
  return net;
}

// Use the weights of an epoch: exact for the final one, otherwise 8-bit integers with scales.
function useWeights(net, epoch) {
  const {weights, snapshots, scales} = net.arrays, exact = epoch === net.final;
  const numbers = exact ? weights : snapshots.subarray(epoch * weights.length);
  let start = 0, tensor = exact ? 0 : (epoch * scales.length) / net.final;
  for (const operation of net.layers.flatMap(layer => layer.operations)) {
    operation.values = {};
    for (const [name, shape] of Object.entries(operation.tensors)) {
      const end = start + shape.reduce((a, b) => a * b, 1), scale = exact ? 1 : scales[tensor++];
      operation.values[name] = new Float32Array(numbers.subarray(start, end)).map(n => scale * n);
      start = end;
    }
  }
}

// Whether the final network's logits of a test image are those that PyTorch computed.
function agrees({arrays, images}, n, logits) {
  const tolerance = 1e-3 * Math.max(1, maxAbs(arrays.logits));
  return logits.every((logit, i) => Math.abs(logit - images[n].logits[i]) <= tolerance);
}

// All test images of a class, counted by the class that the network of an epoch predicts.
const confusions = ({arrays: {confusion}, classes: {length}}, epoch, label) =>
  confusion.subarray((epoch * length + label) * length).subarray(0, length);

// --- Drawings ------------------------------------------------------------------------------------

// The rounded mean of each cell, where a box of the pad is divided into cells. It has 10x10 points.
function shrink(drawing, {top, left, height, width}, shape) {
  const points = (start, length, cells) => count(cells, k =>
    count(10, n => start + Math.floor(((k + (n + 0.5) / 10) * length) / cells)));
  const rows = points(top, height, shape.height), columns = points(left, width, shape.width);
  return count(shape.size, i => {
    const {row, column} = coordinates(shape, i);
    let total = 0;
    for (const y of rows[row]) for (const x of columns[column]) total += drawing[y * PAD.width + x];
    return Math.round(total / 100);
  });
}

// Scale a box of a drawing (PAD, 0 to 255) and center it, as the images of the dataset are. Return
// an image, 28x28.
function cropAndCenter(drawing, box, {object_size: size, centered_by_mass: byMass}) {
  const sides = [box.height, box.width], scale = size / Math.max(...sides);
  const shape = shapeOf([1, ...sides.map(side => Math.max(1, Math.round(side * scale)))]);
  const pixels = shrink(drawing, box, shape), mass = byMass ? pixels : pixels.map(() => 1);
  const place = (axis, side) => {
    const center = sum(mass.map((value, i) => value * coordinates(shape, i)[axis])) / sum(mass);
    return clamp(Math.ceil(13.5 - center), 0, 28 - side);
  };
  const [top, left] = [place("row", shape.height), place("column", shape.width)];
  const image = new Float64Array(IMAGE.size);
  pixels.forEach((value, i) => {
    const {row, column} = coordinates(shape, i);
    image[indexOf(IMAGE, 0, top + row, left + column)] = value;
  });
  return image;
}

// --- Numbers in text -----------------------------------------------------------------------------
// The numbers shown give the result shown. Single steps have as many decimals as that needs. Long
// sums add rounded numbers, and show the rounding.

// Round half away from zero, as calculators do.
function round(x, decimals) {
  const unit = 10 ** decimals;
  return (Math.sign(x) * Math.floor(Math.abs(x) * unit + 0.5 + 1e-9)) / unit;
}

function show(x, decimals = 3) {
  return round(x, decimals).toFixed(decimals).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
}

const inParentheses = text => (text.startsWith("−") ? `(${text})` : text);
const percent = (fraction, decimals = 1) => `${show(100 * fraction, decimals)}%`;

// Decimals for values of this size: about four significant digits.
function decimalsOf(values) {
  const exponent = Math.floor(Math.log10(maxAbs(values) || 1));
  return exponent >= 0 ? Math.max(0, 3 - exponent) : clamp(1 - exponent, 3, 8);
}

// The fewest decimals of `values` with which `compute` gives the same result, rounded.
function decimalsFor(values, compute, decimals) {
  const result = round(compute(values), decimals);
  const same = d => round(compute(values.map(value => round(value, d))), decimals) === result;
  return count(12, d => decimals + d).find(same) ?? 12;
}

// --- Explanations --------------------------------------------------------------------------------

// The formula of an operation for value i, with numbers that give the result shown.
function explainFormula(operation, x, i, decimals) {
  const {op} = operation, numbers = numbersOf(operation, x, i);
  const [formula, compute] = FORMULAS[op] ?? [`${op}(x)`, numbers => numbers.x]; // as dropout
  const names = formula.match(/\w+/g).filter(name => name in numbers);
  const from = values => compute({...numbers, ...Object.fromEntries(names.map((name, k) =>
    [name, values[k]]))});
  const values = names.map(name => numbers[name]), needed = decimalsFor(values, from, decimals);
  const text = formula.replace(/(^|\()?\b(\w+)/g, (all, start, name) => {
    if (!names.includes(name)) return all;
    const shown = show(numbers[name], Number.isInteger(numbers[name]) ? 0 : needed);
    return start === undefined ? inParentheses(shown) : start + shown;
  });
  return {kind: "line", text, total: show(from(values), decimals), decimals: needed};
}

// A term is a window of an input map times a kernel. Rounded numbers give rounded products.
function explainSum(layer, {values: {weight, bias}}, {x, result, i, decimals, inputs}) {
  const map = Math.floor(i / layer.after.area), sources = sourcesOf(layer, i);
  const {length} = sources[0].indices, start = map * sources.length * length;
  const kernels = weight.subarray(start, start + sources.length * length);
  const digits = {inputs, weights: decimalsOf(kernels), result: decimals};
  const terms = sources.map(({map, indices}, n) => {
    const window = indices.map(index => (index < 0 ? 0 : x[index]));
    const kernel = [...kernels.subarray(n * length, (n + 1) * length)];
    const products = window.map((value, k) =>
      round(round(value, inputs) * round(kernel[k], digits.weights), decimals));
    return {map, indices, window, kernel, products, total: round(sum(products), decimals)};
  }).sort((a, b) => Math.abs(b.total) - Math.abs(a.total));
  const total = round(result, decimals), shownBias = bias ? round(bias[map], decimals) : null;
  const rounding = round(total - sum(terms.map(term => term.total)) - shownBias, decimals);
  return {kind: "sum", terms, bias: shownBias, rounding, total, digits};
}

function explainPool(layer, operation, {x, result, i, decimals}) {
  const [{map, indices}] = sourcesOf(layer, i), max = operation.op === "max_pool2d";
  const values = indices.filter(index => index >= 0).map(index => x[index]), by = indices.length;
  const compute = numbers => (max ? Math.max(...numbers) : sum(numbers) / by);
  const digits = {inputs: decimalsFor(values, compute, decimals), result: decimals};
  const total = sum(values.map(value => round(value, digits.inputs)));
  return {kind: "pool", map, values, max, by, total, result, digits};
}

// How a value is computed, one step for each operation. From the last to the first operation, each
// result gets the decimals that the next operation needs.
function explain(net, steps, {layer, i}) {
  const source = net.layers[layer.index - 1], results = steps[layer.index], explained = [];
  const pixel = x => Math.round(255 * (x * net.std + net.mean));
  const given = [source ? steps[source.index].at(-1) : results[0].map(pixel), ...results];
  let {decimals} = layer;
  for (let k = layer.explained.length - 1; k >= 0; k--) {
    const operation = layer.explained[k], x = given[k], result = given[k + 1]?.[i];
    const at = {x, result, i, decimals, inputs: source?.decimals};
    if (OPERATIONS[operation.op] === weightedSums) explained.push(explainSum(layer, operation, at));
    else if (operation.op.endsWith("pool2d")) explained.push(explainPool(layer, operation, at));
    else {
      explained.push(explainFormula(operation, x, i, decimals));
      ({decimals} = explained.at(-1));
    }
  }
  return explained.reverse();
}

// Whether the difference of two logits is a sum over the values of the layer before.
function canCompare({layers}) {
  const {operations: [first, ...others], after} = layers.at(-1);
  const changes = ({op}) => OPERATIONS[op] && !/softmax/.test(op);
  return OPERATIONS[first.op] === weightedSums && after.area === 1 && !others.some(changes);
}

// What contributes most to the difference of two logits: the sum in which their layer would compute
// it, with the differences of their weights and biases.
function explainDifference(net, steps, first, second) {
  const layer = net.layers.at(-1), source = net.layers.at(-2), {operations: [{values}]} = layer;
  const subtract = (numbers, length) => Float64Array.from({length}, (_, k) =>
    numbers[first * length + k] - numbers[second * length + k]);
  const weight = subtract(values.weight, values.weight.length / layer.after.maps);
  const bias = values.bias && subtract(values.bias, 1), {decimals} = layer;
  const [a, b] = [first, second].map(i => round(steps.at(-1)[0][i], decimals)); // as shown
  const given = {x: steps[source.index].at(-1), inputs: source.decimals, decimals};
  return explainSum(layer, {values: {weight, bias}}, {...given, i: 0, result: a - b});
}
