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
// value.
function windowsOf({operations: [{op, attributes}], before, after}) {
  const one = {kernel: [1, 1], places: Int32Array.of(0), mapArea: 1};
  if (op === "linear") return {...one, seen: before.size, sharing: after.maps};
  const {kernel_size: kernel, stride, dilation = [1, 1]} = attributes;
  const {groups = op === "conv2d" ? 1 : after.maps} = attributes;
  const named = {valid: [0, 0], same: kernel.map((n, axis) => (dilation[axis] * (n - 1)) >> 1)};
  const padding = named[attributes.padding] ?? attributes.padding ?? [0, 0];
  const along = (axis, position, k) =>
    position * stride[axis] - padding[axis] + k * dilation[axis];
  const places = [];
  for (let row = 0; row < after.height; row++)
    for (let column = 0; column < after.width; column++)
      for (let y = 0; y < kernel[0]; y++)
        for (let x = 0; x < kernel[1]; x++) {
          const down = along(0, row, y), across = along(1, column, x);
          const inside = down >= 0 && down < before.height && across >= 0 && across < before.width;
          places.push(inside ? indexOf(before, 0, down, across) : -1);
        }
  const [seen, sharing] = [before.maps / groups, after.maps / groups];
  return {kernel, seen, sharing, places: Int32Array.from(places), mapArea: before.area, along};
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
    const {before, windows: {kernel, seen, sharing, along}} = layers[k], {after} = layers[k - 1];
    const {first, last, top, left, height, width} = boxes[k];
    boxes[k - 1] = {first: 0, last: after.maps - 1, top: 0, left: 0, ...after};
    if (!along || before.height !== after.height) continue; // it sees all, or the maps are reshaped
    const side = (axis, start, length, limit) => {
      const places = count(length * kernel[axis], n =>
        along(axis, start + Math.floor(n / kernel[axis]), n % kernel[axis]));
      const inside = places.filter(place => place >= 0 && place < limit);
      return inside.length ? [Math.min(...inside), Math.max(...inside)] : [0, -1]; // all padding
    };
    const [up, down] = side(0, top, height, before.height);
    const [from, to] = side(1, left, width, before.width);
    const group = n => Math.floor(n / sharing) * seen;
    boxes[k - 1] = {first: group(first), last: group(last) + seen - 1,
      top: up, left: from, height: down - up + 1, width: to - from + 1};
  }
  return boxes;
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
  return (x, operation, {windows: {kernel, places, mapArea}, after}) => {
    const length = kernel[0] * kernel[1], output = new Float64Array(after.size);
    for (let i = 0; i < after.size; i++) {
      const offset = Math.floor(i / after.area) * mapArea, start = (i % after.area) * length;
      const values = [];
      for (let k = start; k < start + length; k++)
        if (places[k] >= 0) values.push(x[offset + places[k]]);
      output[i] = combine(values, operation);
    }
    return output;
  };
}

// What an average is divided by: as in PyTorch, padding counts.
function divisor({attributes: {padding = [0, 0], kernel_size: [height, width]}}, length) {
  return Math.max(...padding) > 0 ? height * width : length;
}

function softmax(logits) {
  const most = Math.max(...logits), powers = logits.map(logit => Math.exp(logit - most));
  const total = sum(powers);
  return powers.map(power => power / total);
}

// Operations that compute each value from one value, by their names in PyTorch.
const ELEMENTWISE = {
  sigmoid: x => 1 / (1 + Math.exp(-x)),
  tanh: Math.tanh,
  relu: x => Math.max(0, x),
  leaky_relu: (x, {negative_slope = 0.01}) => (x > 0 ? x : negative_slope * x),
  add: (x, {other}) => x + other,
  sub: (x, {other}) => x - other,
  mul: (x, {other}) => x * other,
  div: (x, {other}) => x / other,
  batch_norm: (x, {running_mean, running_var, weight = 1, bias = 0, eps = 1e-5}) =>
    ((x - running_mean) / Math.sqrt(running_var + eps)) * weight + bias,
};

const OPERATIONS = {
  conv2d: weightedSums,
  linear: weightedSums,
  avg_pool2d: pooling((values, operation) => sum(values) / divisor(operation, values.length)),
  max_pool2d: pooling(values => Math.max(...values)),
  softmax,
  log_softmax: x => softmax(x).map(Math.log),
};
for (const [op, compute] of Object.entries(ELEMENTWISE))
  OPERATIONS[op] = (x, operation) => {
    const shared = Object.keys(operation.values).length ? null : operation.attributes;
    return x.map((value, i) => compute(value, shared ?? attributesAt(operation, i, x.length)));
  };

// The attributes of an operation for value i of `length`: a tensor has one number for each map.
function attributesAt({attributes, values}, i, length) {
  const numbers = Object.entries(values).map(([name, tensor]) =>
    [name, tensor[Math.floor((i * tensor.length) / length)]]);
  return {...attributes, ...Object.fromEntries(numbers)};
}

// The results of all operations, for each layer in turn; the last one is the layer's output. The
// image (28x28, 0 to 255; null: black) is padded and normalized. Operations that do nothing at
// evaluation, such as dropout, are skipped.
function forward({mean, std, layers}, image) {
  let x = new Float64Array(INPUT.size).fill(-mean / std);
  image?.forEach((value, i) => {
    const {row, column} = coordinates(IMAGE, i);
    x[indexOf(INPUT, 0, row + 2, column + 2)] = (value / 255 - mean) / std;
  });
  return layers.map(layer => layer.operations.map(operation => {
    x = OPERATIONS[operation.op]?.(x, operation, layer) ?? x;
    return x;
  }));
}

const outputsOf = steps => steps.map(results => results.at(-1));

function probabilities({layers}, steps) {
  const output = steps.at(-1).at(-1);
  return layers.at(-1).operations.at(-1).op === "softmax" ? output : softmax(output);
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
    if (index === net.layers.length - 1 && !/softmax/.test(layer.operations.at(-1).op))
      layer.explained.push({op: "softmax", attributes: {}, values: {}});
  });
  const imagesFrom = (pixels, classes) => {
    const all = classes.length / (net.epochs.length + 1); // one row of labels, and of each epoch
    return count(all, n => ({
      image: pixels.subarray(784 * n, 784 * (n + 1)),
      label: classes[n],
      answers: net.epochs.map((_, epoch) => classes[(epoch + 1) * all + n]),
    }));
  };
  net.images = imagesFrom(arrays.images, arrays.image_classes);
  net.errors = imagesFrom(arrays.errors, arrays.error_classes);
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

// Whether the logits of test images, from image n on, are those that PyTorch computed.
function agrees({arrays: {logits: expected}, classes}, n, logits) {
  const tolerance = 1e-3 * Math.max(1, maxAbs(expected)), start = n * classes.length;
  return logits.every((logit, i) => Math.abs(logit - expected[start + i]) <= tolerance);
}

// All test images of a class, counted by the class that the network of an epoch predicts.
function confusions({arrays, classes: {length}}, epoch, label) {
  const start = (epoch * length + label) * length;
  return arrays.confusion.subarray(start, start + length);
}

// --- Drawings ------------------------------------------------------------------------------------

// The smallest box around all that is drawn on the pad, or null.
function boundingBox(drawing) {
  let [top, bottom, left, right] = [PAD.height, -1, PAD.width, -1];
  for (let i = 0; i < PAD.size; i++) {
    if (!drawing[i]) continue;
    const row = Math.floor(i / PAD.width), column = i % PAD.width;
    [top, bottom] = [Math.min(top, row), row];
    [left, right] = [Math.min(left, column), Math.max(right, column)];
  }
  return bottom < 0 ? null : {top, left, height: bottom - top + 1, width: right - left + 1};
}

// The mean of each cell, where a box of the pad is divided into cells. Each has 10x10 points.
function shrink(drawing, {top, left, height, width}, shape) {
  const points = (start, length, cells) => count(cells, k =>
    count(10, n => start + Math.floor(((k + (n + 0.5) / 10) * length) / cells)));
  const rows = points(top, height, shape.height), columns = points(left, width, shape.width);
  return count(shape.size, i => {
    const {row, column} = coordinates(shape, i);
    let total = 0;
    for (const y of rows[row]) for (const x of columns[column]) total += drawing[y * PAD.width + x];
    return total / 100;
  });
}

// Scale a box of a drawing (PAD, 0 to 255) and center it, as the images of the dataset are. Return
// an image, 28x28.
function cropAndCenter(drawing, box, {object_size: size, centered_by_mass: byMass}) {
  const sides = [box.height, box.width], scale = size / Math.max(...sides);
  const shape = shapeOf([1, ...sides.map(side => Math.max(1, Math.round(side * scale)))]);
  const pixels = shrink(drawing, box, shape), mass = byMass ? pixels : pixels.map(() => 1);
  const peak = Math.max(...pixels);
  const gain = peak < 253.5 ? 255 / peak : 1; // the images of the datasets reach 254 or 255
  const place = (axis, side) => {
    const center = sum(mass.map((value, i) => value * coordinates(shape, i)[axis])) / sum(mass);
    return clamp(Math.ceil(13.5 - center), 0, 28 - side);
  };
  const [top, left] = [place("row", shape.height), place("column", shape.width)];
  const image = new Float64Array(IMAGE.size);
  pixels.forEach((value, i) => {
    const {row, column} = coordinates(shape, i);
    image[indexOf(IMAGE, 0, top + row, left + column)] = Math.round(gain * value);
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

const SYMBOLS = {add: "+", sub: "−", mul: "×", div: "÷"};

// An operation that changes value i only: the numbers to show, how to compute the result from
// them, and the text in which they are shown. `x` are the operation's inputs.
function describeStep({mean, std}, operation, x, i) {
  const {op} = operation, at = attributesAt(operation, i, x.length), name = op.replaceAll("_", " ");
  if (SYMBOLS[op]) return {
    numbers: [x[i], at.other],
    compute: ([value, other]) => ELEMENTWISE[op](value, {other}),
    text: (value, other) => `${value} ${SYMBOLS[op]} ${inParentheses(other)}`,
  };
  if (op === "batch_norm") return {
    numbers: [x[i], at.running_mean, Math.sqrt(at.running_var + (at.eps ?? 1e-5)),
      at.weight ?? 1, at.bias ?? 0],
    compute: ([value, m, s, w, b]) => ((value - m) / s) * w + b,
    text: (value, m, s, w, b) =>
      `(${value} − ${inParentheses(m)}) ÷ ${s} × ${inParentheses(w)} + ${inParentheses(b)}`,
  };
  if (/softmax/.test(op)) {
    const most = Math.max(...x), total = Math.exp(x[i] - most) / softmax(x)[i];
    const [log, unit] = op === "softmax" ? ["", "%"] : ["log of ", ""];
    return {
      numbers: [x[i], most, total],
      compute: ([value, m, t]) => log ? value - m - Math.log(t) : (100 * Math.exp(value - m)) / t,
      text: (value, m, t) => `${name}: ${log}e^(${value} − ${inParentheses(m)}) ÷ ${t}`,
      unit,
    };
  }
  if (op === "leaky_relu" && x[i] < 0) return {
    numbers: [x[i], at.negative_slope ?? 0.01],
    compute: ([value, slope]) => value * slope,
    text: (value, slope) => `leaky relu: ${inParentheses(value)} × ${slope}`,
  };
  if (op === "input") {
    const pixel = Math.round(255 * (x[i] * std + mean));
    return {
      numbers: [mean, std],
      compute: ([m, s]) => (pixel / 255 - m) / s,
      text: (m, s) => `(pixel ${pixel} ÷ 255 − ${m}) ÷ ${s}`,
    };
  }
  const compute = ELEMENTWISE[op] ?? (value => value); // such as dropout
  return {
    numbers: [x[i]],
    compute: ([value]) => compute(value, at),
    text: value => `${name}(${value})`,
  };
}

// A term of a sum: a window of an input map times a kernel. Rounded numbers give rounded products.
function makeTerm(map, window, kernel, digits) {
  const products = window.map((value, k) => round(
    round(value, digits.inputs) * round(kernel[k], digits.weights), digits.result));
  return {map, window, kernel, products, total: round(sum(products), digits.result)};
}

function finishSum(terms, bias, result, digits) {
  terms.sort((a, b) => Math.abs(b.total) - Math.abs(a.total));
  const total = round(result, digits.result);
  const shownBias = bias === undefined ? null : round(bias, digits.result);
  const rounding = round(total - sum(terms.map(term => term.total)) - shownBias, digits.result);
  return {terms, bias: shownBias, rounding, total, digits};
}

function explainSum(layer, {values: {weight, bias}}, {x, result, i, decimals, inputs}) {
  const map = Math.floor(i / layer.after.area), sources = sourcesOf(layer, i);
  const {length} = sources[0].indices, start = map * sources.length * length;
  const kernels = weight.subarray(start, start + sources.length * length);
  const digits = {inputs, weights: decimalsOf(kernels), result: decimals};
  const terms = sources.map(({map, indices}, n) => {
    const window = indices.map(index => (index < 0 ? 0 : x[index]));
    return makeTerm(map, window, [...kernels.subarray(n * length, (n + 1) * length)], digits);
  });
  return {kind: "sum", ...finishSum(terms, bias?.[map], result, digits)};
}

function explainPool(layer, operation, {x, result, i, decimals}) {
  const [{map, indices}] = sourcesOf(layer, i), max = operation.op === "max_pool2d";
  const values = indices.filter(index => index >= 0).map(index => x[index]);
  const by = divisor(operation, values.length);
  const compute = numbers => (max ? Math.max(...numbers) : sum(numbers) / by);
  const digits = {inputs: decimalsFor(values, compute, decimals), result: decimals};
  const total = sum(values.map(value => round(value, digits.inputs)));
  return {kind: "pool", map, values, max, by, total, result, digits};
}

// How a value is computed, one step for each operation. From the last to the first operation, each
// result gets the decimals that the next operation needs.
function explain(net, steps, {layer, i}) {
  const source = net.layers[layer.index - 1], results = steps[layer.index], explained = [];
  const given = [source ? steps[source.index].at(-1) : results[0], ...results]; // operation k: [k]
  let {decimals} = layer;
  for (let k = layer.explained.length - 1; k >= 0; k--) {
    const operation = layer.explained[k], x = given[k], result = given[k + 1]?.[i];
    const at = {x, result, i, decimals, inputs: source?.decimals};
    if (OPERATIONS[operation.op] === weightedSums) explained.push(explainSum(layer, operation, at));
    else if (operation.op.endsWith("pool2d")) explained.push(explainPool(layer, operation, at));
    else {
      const {numbers, compute, text, unit = ""} = describeStep(net, operation, x, i);
      const total = show(compute(numbers), unit ? 1 : decimals) + unit;
      const needed = decimalsFor(numbers, compute, unit ? 1 : decimals);
      decimals = Math.max(needed, unit ? layer.decimals : 0);
      const shown = numbers.map(number => show(number, decimals));
      explained.push({kind: "line", text: text(...shown), total});
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

// Which values of the layer before contribute most to the difference of two logits. Each term is a
// value times the difference of two weights.
function explainDifference(net, steps, first, second) {
  const layer = net.layers.at(-1), source = net.layers.at(-2), x = outputsOf(steps)[source.index];
  const {weight, bias} = layer.operations[0].values, logits = steps.at(-1)[0];
  const digits = {inputs: source.decimals, weights: decimalsOf(weight), result: layer.decimals};
  const length = weight.length / layer.after.maps;
  const terms = sourcesOf(layer, first).flatMap(({indices}) => indices).map((index, k) => {
    const pair = [first, second].map(i => round(weight[i * length + k], digits.weights));
    return {...makeTerm(index, [x[index]], [pair[0] - pair[1]], digits), pair};
  });
  const difference = values => values
    && round(values[first], digits.result) - round(values[second], digits.result);
  return finishSum(terms, difference(bias), difference(logits), digits);
}
