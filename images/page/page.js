"use strict";

// Draw the networks in this file, and respond to the reader.

const state = {
  net: null,
  epoch: 0, // index in net.epochs
  kind: "image", // of the input: "image" (a test image), "error" (of the final network), "drawing"
  n: 0, // index in net.images or net.errors
  image: null, // the input, 28x28, 0 to 255; null: nothing is drawn
  steps: null, // what `forward` returns for it
  value: null, // the value that is explained
  pinned: false, // whether it stays when the pointer moves on
  rival: null, // the class to compare with, if the value is a class
  opened: new Set(), // keys of the details that are open
  slide: false, // whether the window of the value slides
  outputs: null, // of all layers, for each test image, once they are computed
  cell: null, // the class whose confusions are shown
  tour: -1, // index of the current step; 0 offers the tour
  stroke: null, // last point of the current stroke
  pen: {x: 140, y: 140},
};
const networks = {}; // by name, once they are read
const timers = {}; // by purpose
const element = id => document.getElementById(id);
const pad = element("drawing").getContext("2d", {willReadFrequently: true});
const lastLayer = () => state.net.layers.at(-1);
const valuesOf = layer => state.steps[layer.index].at(-1);
const imagesOf = kind => (kind === "error" ? state.net.errors : state.net.images);
const labelOfInput = () => // of a drawing: undefined
  state.kind === "drawing" ? undefined : imagesOf(state.kind)[state.n].label;

// --- Elements and pictures -----------------------------------------------------------------------

// An element with properties, such as className or onclick, and children. `key` names it in `fill`.
function make(tag, {style = "", key = "", ...properties}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.style.cssText = style;
  made.dataset.key = key;
  made.append(...children);
  return made;
}

const span = (className, ...children) => make("span", {className}, ...children);
const caption = text => make("p", {className: "caption"}, text);
const row = (label, number) =>
  make("p", {className: "row"}, span("", label), span("number", number));

// Replace the children of an element. The focus stays on the element with the same key.
function fill(container, ...children) {
  const focused = container.contains(document.activeElement) && document.activeElement.dataset.key;
  container.replaceChildren(...children);
  if (focused) container.querySelector(`[data-key="${focused}"]`)?.focus({preventScroll: true});
}

const gray = ([low, high]) => value => {
  const shade = (255 * (value - low)) / (high - low);
  return [shade, shade, shade];
};

// Blue below 0, white at 0, red above; never so dark that black text on it is hard to read.
function diverging(most) {
  return value => {
    const strength = Math.min(1, Math.abs(value) / (most || 1)), rest = 255 - 155 * strength;
    return value < 0 ? [rest, 255 - 115 * strength, 255] : [255 - 5 * strength, rest, rest];
  };
}

function paint(canvas, values, color) {
  const image = new ImageData(canvas.width, canvas.height), {data} = image;
  for (let i = 0; i < values.length; i++) {
    const [red, green, blue] = color(values[i]);
    data[4 * i] = red;
    data[4 * i + 1] = green;
    data[4 * i + 2] = blue;
    data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// A canvas with one pixel for each value. The style sheet enlarges it.
function picture({height, width}, values, color) {
  return paint(make("canvas", {height, width}), values, color);
}

// A picture with a frame around a box of it.
function framed(shape, values, color, box) {
  const frame = make("i", {});
  placeFrame(frame, box, shape);
  return make("span", {className: "framed"}, picture(shape, values, color), frame);
}

function placeFrame(frame, box, {height, width}) {
  if (frame.hidden === Boolean(box)) frame.hidden = !box; // writing it is slow
  if (!box) return;
  const part = {left: width, top: height, width, height};
  for (const side in part) frame.style[side] = `${(100 * box[side]) / part[side]}%`;
}

// Which value of a picture is at the position of an event.
function positionOf({offsetX, offsetY, target: {clientWidth, clientHeight}}, {height, width}) {
  return [[offsetY / clientHeight, height], [offsetX / clientWidth, width]].map(([part, side]) =>
    clamp(Math.floor(part * side), 0, side - 1));
}

// --- Layers --------------------------------------------------------------------------------------

const NAMES = {conv2d: "Convolution", avg_pool2d: "Average pooling", max_pool2d: "Max pooling",
  linear: "Fully connected", input: "Image"};
const times = ([height, width]) => `${height}×${width}`;

function sizeOf({maps, height, width, area}) {
  if (area === 1) return `${maps} units`;
  return maps === 1 ? times([height, width]) : `${maps} maps of ${times([height, width])}`;
}

// The name of a layer, its size and its operations.
function titleOf({name, after, explained: [{op, attributes}, ...others]}) {
  const {kernel_size: kernel, stride, groups} = attributes, later = others.map(other => other.op);
  let does = kernel ? `${NAMES[op]} ${times(kernel)}` : NAMES[op];
  if (kernel && times(stride) !== times(op === "conv2d" ? [1, 1] : kernel))
    does += `, stride ${times(stride)}`;
  if (groups > 1) does += `, ${groups} groups`;
  if (later.length) does += `, then ${[...new Set(later)].join(", ").replaceAll("_", " ")}`;
  return make("figcaption", {}, make("b", {}, name), span("", sizeOf(after)), span("", does));
}

function scaleOf(range) {
  const [low, high] = range.map(value => show(value, Math.min(2, decimalsOf(range))));
  return make("div", {className: "scale"}, low, make("i", {}), high);
}

// Make a figure for each layer but the last, whose values are the list of classes.
function buildLayers() {
  const last = lastLayer(), layers = state.net.layers.slice(0, -1);
  const handlers = at => ({
    onpointermove: event => { if (event.pointerType === "mouse") hover(at(event)); },
    onclick: event => pin(at(event)),
  });
  for (const layer of layers) {
    const {after, after: {maps, height, width, area}, name} = layer;
    const scale = area > 1 ? 2.4 + 20 / Math.max(height, width) : 11, gap = area > 1 ? 4 : 1;
    const most = Math.max(1, Math.floor(560 / (height * scale + gap))); // in a column
    layer.rows = Math.min(maps, most, Math.max(8, Math.ceil(maps / 4)));
    layer.width = Math.ceil(maps / layer.rows) * (width * scale + gap);
    layer.cells = count(maps, () => framed(after, new Float64Array(area), gray([0, 1])));
    layer.maps = make("div", {className: "maps", tabIndex: 0, role: "application",
      style: `--rows: ${layer.rows}; --width: ${width * scale}; --gap: ${gap}px`,
      ariaLabel: `${name}, ${sizeOf(after)}. Arrow keys select a value; Enter pins it`,
      onkeydown: event => moveValue(layer, event), ...handlers(event => valueAt(layer, event)),
    }, ...layer.cells);
  }
  fill(element("layers"), ...layers.map(layer =>
    make("figure", {}, titleOf(layer), scaleOf(layer.range), layer.maps)));
  element("output").querySelector("figcaption").replaceWith(titleOf(last));
  fill(element("classes"), ...state.net.classes.map((name, i) => make("li", {}, make("button",
    handlers(() => ({layer: last, i})), span("name", name), span("share"), span("number")))));
}

// Make the layers as large as the page has room for.
function arrange() {
  const layers = state.net.layers.slice(0, -1), room = element("layers").clientWidth;
  const widthAt = unit => sum(layers.map(({width}) => Math.max(64, width * unit + 4) + 8));
  let unit = innerWidth < 1280 ? 1 : clamp((innerHeight - 390) / 560, 0.7, 1.8);
  if (innerWidth >= 760) // otherwise they wrap
    while (unit > 0.3 && widthAt(unit) > room + 8) unit -= 0.02;
  element("layers").style.setProperty("--unit", `${unit}px`);
}

// Outline the values from which the selected value is computed.
function outlineLayers() {
  const {net, value} = state, boxes = value ? receptiveField(net.layers, value) : [];
  for (const {index, after, cells, maps} of net.layers.slice(0, -1)) {
    const {first, last, height, width} = boxes[index] ?? {first: Infinity};
    const all = (last - first + 1) * height * width === after.size;
    maps.classList.toggle("marked", all);
    cells.forEach(({lastChild: frame}, map) =>
      placeFrame(frame, !all && first <= map && map <= last && boxes[index], after));
  }
  [...element("classes").children].forEach((item, i) =>
    item.classList.toggle("marked", value?.layer === lastLayer() && value.i === i));
}

// The value at the position of an event, or null between the maps.
function valueAt(layer, event) {
  const map = layer.cells.indexOf(event.target.parentElement);
  return map < 0 ? null : {layer, i: indexOf(layer.after, map, ...positionOf(event, layer.after))};
}

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

// The direction of an arrow key, [down, across], or undefined.
function arrowOf(event) {
  const arrow = ARROWS[event.key];
  if (arrow) event.preventDefault();
  return arrow;
}

// Arrow keys select the next value, across all maps of a layer as they are arranged, or of one map.
function moveValue(layer, event, stay = false) {
  const {value} = state, {after, rows} = layer, {height, width} = after;
  const arrow = arrowOf(event), inside = value?.layer === layer;
  if (event.key === "Enter" && inside) pin(value);
  if (!arrow) return;
  const {map, row, column} = inside ? coordinates(after, value.i)
    : {map: 0, row: -arrow[0], column: -arrow[1]};
  const down = (map % rows) * height + row + arrow[0];
  const across = Math.floor(map / rows) * width + column + arrow[1];
  const next = Math.floor(across / width) * rows + Math.floor(down / height);
  const outside = down < 0 || across < 0 || down >= rows * height || next >= after.maps;
  if (outside || (stay && next !== map)) return;
  pauseSlide();
  select({layer, i: indexOf(after, next, down % height, across % width)}, state.pinned);
  speak(element("title").textContent);
}

// --- The explanation of a value ------------------------------------------------------------------

const mapName = ({name, after: {maps}}, map) => (maps > 1 ? `${name}, map ${map + 1}` : name);

function valueName({layer, i}) {
  const {after, name} = layer, {map, row, column} = coordinates(after, i);
  if (layer === lastLayer()) return `${name}, ${state.net.classes[i]}`;
  if (after.area === 1) return `${name}, unit ${map + 1}`;
  return `${mapName(layer, map)}, row ${row + 1}, column ${column + 1}`;
}

// Details that stay open when the panel is filled again. Their content is made when they open.
function details(key, summary, content) {
  const open = state.opened.has(key);
  const made = make("details", {open}, make("summary", {key}, ...summary));
  if (open) made.append(...content());
  made.ontoggle = () => {
    state.opened[made.open ? "add" : "delete"](key);
    if (made.open && !made.children[1]) made.append(...content());
  };
  return made;
}

function grid(values, columns, color, decimals, title) {
  const cells = values.map(value => {
    const shade = Uint8ClampedArray.from(color(value)), light = Math.max(...shade) >= 118;
    const style = `background: rgb(${shade}); color: ${light ? "black" : "white"}`;
    return make("span", {style}, show(value, decimals).replace(/^(−?)0\./, "$1."));
  });
  const style = `grid-template-columns: repeat(${columns}, auto)`;
  return make("figure", {}, caption(title), make("div", {className: "grid", style}, ...cells));
}

function renderPanel() {
  const {net, value, pinned, steps, rival, slide} = state, rows = [];
  element("hint").hidden = Boolean(value);
  element("selected").hidden = !value;
  if (!value) return;
  const {layer, i} = value, shown = show(valuesOf(layer)[i], layer.decimals);
  const explained = explain(net, steps, value);
  for (const step of explained) rows.push(...RENDER[step.kind](step, layer));
  const difference = pinned && layer === lastLayer() && canCompare(net) ? renderDifference(i) : [];
  const maps = pinned && layer.index && layer.after.area > 1 ? renderMaps(value, explained[0]) : [];
  element("title").textContent = `${valueName(value)}: ${shown}`;
  element("unpin").textContent = pinned ? "Unpin (Esc)" : "Pin";
  element("slide").hidden = !maps.length;
  element("play-slide").textContent = slide ? "❚❚ Pause" : "▶ Slide the window";
  fill(element("maps"), ...maps);
  fill(element("explanation"),
    ...(rival === null ? [...rows, ...difference] : [...difference, ...rows]));
}

const RENDER = {
  line: ({text, total}) => [row(text, total)],
  pool({map, values, max, by, total, result, digits}, layer) {
    const source = state.net.layers[layer.index - 1], end = show(result, digits.result);
    const columns = Math.min(layer.windows.kernel[1], values.length);
    const cells = grid(values, columns, gray(source.range), digits.inputs, mapName(source, map));
    if (max) return [cells, row(`Largest of ${values.length}`, end)];
    const sumShown = show(total, digits.inputs);
    return [cells, row("Sum", sumShown), row(`Average: ${sumShown} ÷ ${by}`, end)];
  },
  sum(step, layer) {
    const source = state.net.layers[layer.index - 1], units = layer.windows.kernel[0] === 1;
    const draw = units ? term => unitTerm(term, source) : term => mapTerm(term, layer, source);
    const title = `Contributions from ${source.name}, strongest first (red adds, blue subtracts)`;
    const total = row("Sum", show(step.total, step.digits.result));
    return [caption(title), ...sumRows(step, draw), total];
  },
};

// The terms of a sum, drawn by `draw`, with bars. All but the largest eight are folded away.
function sumRows({terms, bias, rounding, digits}, draw) {
  const others = terms.slice(8), rest = sum(others.map(({total}) => total));
  const longest = maxAbs([terms[0].total, rest, bias ?? 0]) || 1;
  const bar = number => {
    const width = Math.min(100, (100 * Math.abs(number)) / longest);
    const className = number < 0 ? "minus" : "plus";
    return [span("bar", make("i", {className, style: `width: ${width}%`})),
      span("number", show(number, digits.result))];
  };
  const line = (name, number) => make("p", {className: "term"}, span("name", name), ...bar(number));
  const drawn = list => list.map(term => draw({...term, digits, bar: bar(term.total)}));
  const rows = drawn(terms.slice(0, 8));
  if (others.length) {
    const summary = [span("name", `${others.length} smaller terms together`), ...bar(rest)];
    rows.push(details("others", summary, () => drawn(others)));
  }
  if (bias !== null) rows.push(line("Bias", bias));
  if (rounding) rows.push(line("Rounding of the products", rounding));
  return rows;
}

// One value times one weight, or times the difference of a pair of weights.
function unitTerm({map: i, window, kernel, pair, digits, bar}, layer) {
  const [a, b] = (pair ?? kernel).map(weight => show(weight, digits.weights));
  const factor = pair ? `(${a} − ${inParentheses(b)})` : inParentheses(a);
  const text = valueName({layer, i}).replace(`${layer.name}, `, "");
  const onclick = () => select({layer, i}, true);
  const link = make("button", {className: "link", key: text, onclick}, text);
  return make("p", {className: "term"}, span("name", link),
    span("product", `${show(window[0], digits.inputs)} × ${factor}`), ...bar);
}

// A window of one map times a kernel. It opens to show all numbers.
function mapTerm({map, window, kernel, products, total, digits, bar}, layer, source) {
  const shape = {height: layer.windows.kernel[0], width: layer.windows.kernel[1]};
  const shade = gray(source.range), color = diverging(maxAbs(kernel)), name = mapName(source, map);
  const cells = (values, ...how) => grid(values, shape.width, ...how);
  const equation = () => [make("div", {className: "equation"},
    cells(window, shade, digits.inputs, name),
    span("", "× ", cells(kernel, color, digits.weights, "kernel")),
    span("", "= ", cells(products, diverging(maxAbs(products)), digits.result,
      `products, in total ${show(total, digits.result)}`)))];
  const title = span("name", name.replace(/.*, /, ""));
  if (!state.pinned) return make("p", {className: "term"}, title, ...bar); // pictures would be slow
  const pictures = [picture(shape, window, shade), " × ", picture(shape, kernel, color)];
  return details(`map ${map}`, [title, span("product", ...pictures), ...bar], equation);
}

// Which units make the network prefer one class to another.
function renderDifference(first) {
  const {net, steps} = state, {classes} = net, second = state.rival ?? rivalOf(first);
  const step = explainDifference(net, steps, first, second), source = net.layers.at(-2);
  const options = classes.map((name, i) => new Option(name, i, false, i === second));
  const choice = make("select", {key: "rival", ariaLabel: "Class to compare with"}, ...options);
  choice.onchange = () => compare(first, Number(choice.value));
  const [name, other] = [classes[first], classes[second]];
  return [make("h3", {}, `Why ${name} and not `, choice, "?"),
    caption(`${source.name} × difference of weights: red speaks for ${name}, blue for ${other}`),
    ...sumRows(step, term => unitTerm(term, source)),
    row(`Score of ${name} − score of ${other}`, show(step.total, step.digits.result))];
}

// The class to compare with: of a misclassified image its own class, otherwise the next best.
function rivalOf(first) {
  const scores = [...valuesOf(lastLayer())], label = labelOfInput() ?? first;
  if (label !== first && argmax(scores) === first) return label;
  scores[first] = -Infinity;
  return argmax(scores);
}

// --- The sliding window --------------------------------------------------------------------------

// The map of a value and a map that it sees, enlarged. While the window slides, the map fills in.
function renderMaps({layer, i}, explained) {
  const {net, slide} = state, {after, windows} = layer, source = net.layers[layer.index - 1];
  const {map, row: top, column: left} = coordinates(after, i), name = mapName(layer, map);
  const from = shownInput(explained), box = receptiveField(net.layers, {layer, i})[source.index];
  const part = (of, n) => [...valuesOf(of).subarray(n * of.after.area, (n + 1) * of.after.area)];
  const own = part(layer, map);
  if (slide) own.length = (i % after.area) + 1;
  const onclick = event => {
    pauseSlide();
    select({layer, i: indexOf(after, map, ...positionOf(event, after))}, true);
  };
  const outlined = framed(after, own, gray(layer.range), {left, top, width: 1, height: 1});
  const result = make("figure", {}, caption(`→ ${name}`), Object.assign(outlined, {
    tabIndex: 0, role: "application", ariaLabel: `${name}, enlarged. Arrow keys move the window`,
    onclick, onkeydown: event => moveValue(layer, event, true),
  }));
  outlined.dataset.key = "result";
  if (!windows.along || source.after.area === 1) return [result];
  return [make("figure", {}, caption(mapName(source, from)),
    framed(source.after, part(source, from), gray(source.range), box)), result];
}

// The input map to show: an opened one, or the one with the largest weights.
function shownInput({terms, map}) {
  if (!terms) return map; // of pooling
  const weights = terms.map(({kernel}) => sum(kernel.map(Math.abs)));
  const opened = terms.find(term => state.opened.has(`map ${term.map}`));
  return (opened ?? terms[argmax(weights)]).map;
}

// Slide from the first position of the map to the last.
function startSlide() {
  const {layer, i} = state.value, {area} = layer.after;
  const next = () => {
    if (state.value.i % area === area - 1) pauseSlide();
    else select({layer, i: state.value.i + 1}, true);
  };
  state.slide = true;
  timers.slide = setInterval(next, clamp(12000 / area, 30, 250));
  select({layer, i: i - (i % area)}, true);
}

function pauseSlide() {
  if (!state.slide) return;
  clearInterval(timers.slide);
  state.slide = false;
  renderPanel();
}

// --- Test images ---------------------------------------------------------------------------------

// Compute all layers for the test images, in slices, so that the page stays responsive.
function runImages() {
  const {net, epoch} = state, outputs = [];
  const slice = () => {
    const end = performance.now() + 8;
    while (outputs.length < net.images.length && performance.now() < end)
      outputs.push(outputsOf(forward(net, net.images[outputs.length].image)));
    if (outputs.length < net.images.length) {
      timers.images = setTimeout(slice);
      return;
    }
    state.outputs = outputs;
    renderPatches();
    if (epoch === net.final) checkResults(0, outputs.flatMap(all => [...all.at(-1)]));
    net.checked ||= epoch === net.final;
  };
  clearTimeout(timers.images);
  timers.images = setTimeout(slice);
}

// Hide a network if the logits of test images, from image n on, differ from PyTorch's.
function checkResults(n, logits) {
  const correct = agrees(state.net, n, logits);
  element("problem").textContent = correct ? ""
    : `The network of ${state.net.name} is not shown: this page's results differ from PyTorch's.`;
  document.querySelector("main").hidden = !correct;
}

// Show the test images for which a map or unit has its highest values, or a unit its lowest.
function renderPatches() {
  const {net: {layers}, outputs, value, pinned} = state;
  if (!pinned || !outputs || !value.layer.index) return fill(element("patches"));
  const {layer} = value, {area} = layer.after, first = value.i - (value.i % area);
  const found = outputs.map((all, n) => {
    const values = all[layer.index].subarray(first, first + area), at = argmax(values);
    return {n, i: first + at, value: values[at]};
  }).sort((a, b) => b.value - a.value);
  const patch = ({n, i, value}) => {
    const [box] = receptiveField(layers, {layer, i}), {top, left, width, height} = box;
    const pixels = count(height * width, k =>
      outputs[n][0][indexOf(INPUT, 0, top + Math.floor(k / width), left + (k % width))]);
    const onclick = () => {
      setImage("image", n);
      select({layer, i}, true);
    };
    const button = make("button", {onclick}, picture(box, pixels, gray(layers[0].range)));
    return labelImage(button, "image", n, `: ${show(value, layer.decimals)}`);
  };
  const list = (title, chosen) =>
    [caption(title), make("div", {className: "images"}, ...chosen.map(patch))];
  const [strongest, weakest] = [found.slice(0, 10), found.slice(-10)];
  return fill(element("patches"), ...(area > 1
    ? list("Patches that activate this map most (click to open)", strongest)
    : [...list("Strongest response", strongest), ...list("Weakest response", weakest)]));
}

// Say on a button what image n of a kind is, and what the network of this epoch takes it for.
function labelImage(button, kind, n, more = "") {
  const {net: {classes}, epoch} = state, all = imagesOf(kind), {label, answers} = all[n];
  const nth = all.slice(0, n + 1).filter(image => image.label === label).length;
  const wrong = answers[epoch] === label ? "" : `, classified as ${classes[answers[epoch]]}`;
  const title = `${classes[label]} ${nth}${wrong}${more}`;
  return Object.assign(button, {title, ariaLabel: title, className: wrong && "wrong"});
}

const galleryOf = kind => (kind === "error" ? "error" : "image");

// Make a button for each test image, or for each error.
function buildImages(kind) {
  fill(element("images"), ...imagesOf(kind).map(({image}, n) =>
    make("button", {onclick: () => setImage(kind, n)}, picture(IMAGE, image, gray([0, 255])))));
  for (const name of ["image", "error"]) {
    element(`show-${name}s`).ariaPressed = name === kind;
    element(`${name}s-note`).hidden = name !== kind;
  }
}

function labelImages() {
  const {kind, n, net, epoch} = state, shown = galleryOf(kind);
  [...element("images").children].forEach((button, k) => {
    labelImage(button, shown, k).ariaPressed = kind === shown && k === n;
    button.tabIndex = k === (kind === shown ? n : 0) ? 0 : -1;
  });
  element("show-errors").disabled = epoch !== net.final || !net.errors.length;
}

// --- The input and the answer --------------------------------------------------------------------

// Take image n of a kind as the input, or start a drawing.
function setImage(kind, n = 0) {
  const before = galleryOf(state.kind), gallery = galleryOf(kind);
  Object.assign(state, {kind, n});
  if (gallery !== before) buildImages(gallery);
  showImage();
  labelImages();
  update();
}

function showImage() {
  const {kind, n} = state, {width, height} = PAD;
  state.image = kind === "drawing" ? null : imagesOf(kind)[n].image;
  pad.clearRect(0, 0, width, height);
  pad.imageSmoothingEnabled = false;
  if (state.image) pad.drawImage(picture(IMAGE, state.image, gray([0, 255])), 0, 0, width, height);
  element("crop").hidden = true;
}

// Compute all layers for the input, and show them.
function update() {
  state.steps = forward(state.net, state.image);
  for (const {cells, range, after: {area}, index} of state.net.layers.slice(0, -1))
    cells.forEach(({firstChild: canvas}, map) =>
      paint(canvas, state.steps[index].at(-1).subarray(map * area, (map + 1) * area), gray(range)));
  outlineLayers();
  renderAnswer();
  renderPanel();
  saveState();
}

function renderAnswer() {
  const {net, image, kind, steps, stroke} = state, {classes} = net;
  const chances = probabilities(net, steps), answer = argmax(chances), rival = rivalOf(answer);
  const label = labelOfInput() ?? answer, correct = answer === label;
  const verdict = correct ? "✓ Correct" : `✗ Wrong: it is ${classes[label]}`;
  element("answer").textContent = image ? classes[answer] : "";
  element("verdict").textContent = kind === "drawing" ? "" : verdict;
  element("verdict").className = correct ? "" : "mistake";
  const why = image ? `Why ${classes[answer]} and not ${classes[rival]}?` : "Why?";
  Object.assign(element("why"), {hidden: !canCompare(net), disabled: !image, textContent: why});
  element("why").onclick = () => compare(answer, rival);
  [...element("classes").children].forEach(({firstChild: {children: [, bar, number]}}, i) => {
    bar.style.width = `${image ? 100 * chances[i] : 0}%`;
    number.textContent = image ? percent(chances[i]) : "";
  });
  const text = `${classes[answer]}, ${percent(chances[answer])}. ${element("verdict").textContent}`;
  if (image && !stroke && !timers.play) speak(text);
}

// Tell screen readers, once nothing has changed for a moment.
function speak(text) {
  clearTimeout(timers.speak);
  timers.speak = setTimeout(() => { element("spoken").textContent = text; }, 700);
}

// Draw a line through points on the pad. It replaces a test image.
function draw(points) {
  if (state.kind !== "drawing") setImage("drawing");
  const lineWidth = state.net.object_size < 28 ? 22 : 34; // of the strokes of digits, or of clothes
  Object.assign(pad, {strokeStyle: "white", lineCap: "round", lineJoin: "round", lineWidth});
  pad.beginPath();
  pad.moveTo(points[0].x + 0.01, points[0].y); // a line without a length would be invisible
  for (const {x, y} of points) pad.lineTo(x, y);
  pad.stroke();
  readPad();
}

function readPad() {
  const {data} = pad.getImageData(0, 0, PAD.width, PAD.height);
  const drawing = new Float32Array(PAD.size);
  for (let i = 0; i < PAD.size; i++) drawing[i] = (data[4 * i] * data[4 * i + 3]) / 255;
  const box = boundingBox(drawing), centered = element("centered").checked;
  const whole = {top: 0, left: 0, ...PAD};
  if (!box) state.image = null;
  else if (centered) state.image = cropAndCenter(drawing, box, state.net);
  else state.image = shrink(drawing, whole, IMAGE);
  placeFrame(element("crop"), centered && box, PAD);
  update();
}

// The first pointer draws, with its main button. A stroke may leave the pad and enter it again.
function followPointer(event) {
  const {target, isPrimary, buttons, pointerId, type} = event, {stroke} = state;
  if (!isPrimary) return;
  if (type === "lostpointercapture" || !(buttons & 1)) {
    state.stroke = null;
    if (stroke) renderAnswer();
    return;
  }
  if (type === "pointerdown") target.setPointerCapture(pointerId);
  else if (!stroke) return;
  const {left, top, width} = target.getBoundingClientRect(), zoom = PAD.width / width;
  const points = [...(event.getCoalescedEvents?.() ?? []), event].map(({clientX, clientY}) =>
    ({x: zoom * (clientX - left), y: zoom * (clientY - top)}));
  state.stroke = points.at(-1);
  draw(type === "pointerdown" ? points : [stroke, ...points]);
}

function movePen(event) {
  const {pen} = state, arrow = arrowOf(event);
  if (event.key === "Delete") setImage("drawing");
  if (!arrow) return;
  const [y, x] = [pen.y + 10 * arrow[0], pen.x + 10 * arrow[1]].map(place => clamp(place, 0, 280));
  state.pen = {x, y};
  Object.assign(element("pen").style, {left: `${x / 2.8}%`, top: `${y / 2.8}%`});
  if (event.shiftKey) draw([pen, state.pen]);
}

// --- Selecting a value ---------------------------------------------------------------------------

const isSelected = value => value.layer === state.value?.layer && value.i === state.value.i;

function hover(value) {
  if (!value || state.pinned || isSelected(value)) return;
  cancelAnimationFrame(timers.hover);
  timers.hover = requestAnimationFrame(() => state.pinned || select(value, false));
}

function pin(value) {
  pauseSlide();
  if (value) select(value, !(state.pinned && isSelected(value)));
  if (value && innerWidth < 760)
    (state.pinned ? element("panel") : value.layer.maps)?.scrollIntoView({block: "nearest"});
}

// Explain a value, or none. If it is pinned, it stays. A class can have a rival.
function select(value, pinned, rival = value && isSelected(value) ? state.rival : null) {
  const {value: last, pinned: wasPinned} = state;
  const mapOf = value => value && [value.layer.index, coordinates(value.layer.after, value.i).map];
  const sameMap = pinned === wasPinned && String(mapOf(last)) === String(mapOf(value));
  if (state.value?.layer !== value?.layer) {
    pauseSlide();
    state.opened = new Set();
  }
  Object.assign(state, {value, pinned, rival});
  if (pinned && !state.outputs && !timers.play) runImages();
  if (!sameMap) {
    renderPatches();
    element("panel").scrollTop = 0;
  }
  outlineLayers();
  renderPanel();
  saveState();
}

const compare = (first, second) => select({layer: lastLayer(), i: first}, true, second);

// --- Training ------------------------------------------------------------------------------------

function setEpoch(epoch) {
  const {net} = state, number = net.epochs[epoch], final = epoch === net.final;
  const counts = net.classes.map((_, label) => confusions(net, epoch, label));
  const total = sum(counts.map(sum)), correct = sum(counts.map((row, label) => row[label]));
  const stage = number ? `Epoch ${number}${final ? " (final)" : ""}` : "Before training";
  const all = total.toLocaleString("en");
  const text = `${stage}: ${percent(correct / total)} of ${all} test images correct`;
  Object.assign(state, {epoch, outputs: null});
  clearTimeout(timers.images);
  useWeights(net, epoch);
  element("when").textContent = text;
  element("epoch").value = epoch;
  element("epoch").setAttribute("aria-valuetext", text);
  if (!final && state.kind === "error") { // the errors are those of the final epoch
    Object.assign(state, {kind: "image", n: 0});
    buildImages("image");
    showImage();
  }
  renderPatches();
  labelImages();
  labelStrip();
  update();
  if (state.pinned && !timers.play) runImages();
}

function play() {
  const next = () => {
    setEpoch(state.epoch + 1);
    if (state.epoch === state.net.final) pause();
  };
  element("play").textContent = "❚❚ Pause";
  timers.play = setInterval(next, 900);
  if (state.epoch === state.net.final) setEpoch(0);
}

function pause() {
  element("play").textContent = "▶ Play the training";
  clearInterval(timers.play);
  timers.play = null;
  if (state.pinned && !state.outputs) runImages();
}

// Make a table with the accuracy of each class in each epoch, on all test images.
function buildStrip() {
  const {net} = state;
  const cell = (name, label) => (number, epoch) => {
    const counts = confusions(net, epoch, label);
    const accuracy = counts[label] / Math.max(1, sum(counts));
    const title = `${name}, epoch ${number}: ${percent(accuracy, 0)} correct`;
    const className = accuracy > 0.72 ? "high" : "", style = `--accuracy: ${accuracy}`;
    const onclick = () => {
      pause();
      state.cell = label;
      setEpoch(epoch);
    };
    const properties = {title, ariaLabel: title, className, style, onclick};
    return make("button", properties, show(100 * accuracy, 0));
  };
  const header = [span("name", "Epoch"), ...net.epochs.map(number => span("", number))];
  fill(element("strip"), ...header, ...net.classes.flatMap((name, label) =>
    [span("name", name), ...net.epochs.map(cell(name, label))]));
}

// Mark the current epoch in the table, and describe the selected cell.
function labelStrip() {
  const {net, epoch, cell} = state, {classes, epochs} = net;
  element("strip").querySelectorAll("button").forEach((button, i) => {
    const now = i % epochs.length === epoch, label = Math.floor(i / epochs.length);
    button.classList.toggle("now", now);
    button.ariaPressed = now && label === cell;
    button.tabIndex = now && label === (cell ?? 0) ? 0 : -1;
  });
  element("strip-note").hidden = cell !== null;
  element("confused").hidden = cell === null;
  if (cell === null) return;
  const counts = [...confusions(net, epoch, cell)];
  const others = [...counts.keys()].filter(label => counts[label] && label !== cell)
    .sort((a, b) => counts[b] - counts[a]).slice(0, 4);
  const list = others.map(label => `${classes[label]} (${counts[label]})`).join(", ");
  element("confused").textContent = `${classes[cell]}, epoch ${epochs[epoch]}: ${counts[cell]} of `
    + `${sum(counts)} test images correct. ${list && `Confused with ${list}.`}`;
}

// Arrow keys move the focus over images and cells, which are in rows.
function moveFocus(event) {
  const arrow = arrowOf(event), buttons = [...event.currentTarget.querySelectorAll("button")];
  const columns = buttons.filter(({offsetTop}) => offsetTop === buttons[0].offsetTop).length;
  const next = buttons.indexOf(event.target) + (arrow ? columns * arrow[0] + arrow[1] : 0);
  buttons[next]?.focus();
}

// --- The tour ------------------------------------------------------------------------------------

// Select the value with the highest score in the first layer with maps that has an operation.
function selectExample(op, score) {
  const layer = state.net.layers.find(({operations, windows, after}) =>
    operations[0].op.endsWith(op) && windows.along && after.area > 1);
  select(layer ? {layer, i: argmax(valuesOf(layer).map(score))} : null, Boolean(layer));
  return layer;
}

// What the steps of the tour show on the current image.
const EXAMPLES = {
  draw: () => select(null, false),
  window: () => selectExample("conv2d", value => value),
  slide: () => selectExample("conv2d", value => value) && startSlide(),
  pool: () => selectExample("pool2d", value => -Math.abs(value - 0.5)), // a mixed window
  answer: () => element("why").onclick(),
  training() {
    select(null, false);
    setEpoch(0);
    play();
  },
};

function goToStep(step) {
  const steps = [...element("tour").querySelectorAll("p")];
  pauseSlide();
  pause();
  state.tour = step;
  element("tour").hidden = step < 0 || step === steps.length;
  if (element("tour").hidden) return;
  steps.forEach((text, k) => { text.hidden = k !== step; });
  element("tour-back").hidden = step === 0;
  element("tour-next").textContent = ["Start the tour", ...Array(5).fill("Next"), "Finish"][step];
  if (!step) return; // the offer
  const {net, image} = state, {example, look} = steps[step].dataset;
  if (state.epoch !== net.final) setEpoch(net.final);
  if (!image) setImage("image");
  EXAMPLES[example]();
  element("tour-next").focus({preventScroll: true});
  if (innerWidth < 760) element(look).scrollIntoView();
}

// --- The address ---------------------------------------------------------------------------------

// The state as #MNIST/epoch-8/image-33/C3-2-6-6: map, row and column. Units have one number, and
// classes that are compared two.
function address() {
  const {net, epoch, kind, n, value, pinned, rival} = state;
  const parts = [encodeURIComponent(net.name), `epoch-${net.epochs[epoch]}`,
    kind === "drawing" ? kind : `${kind}-${n + 1}`];
  if (pinned) {
    const {layer, i} = value, {map, row, column} = coordinates(layer.after, i);
    const numbers = layer.after.area > 1 ? [map, row, column] : [map];
    if (rival !== null) numbers.push(rival);
    parts.push([layer.name, ...numbers.map(number => number + 1)].join("-"));
  }
  return `#${parts.join("/")}`;
}

function saveState() {
  if (location.hash !== address()) history.replaceState(null, "", address());
}

// Show what the address says. What this page does not have is left out.
function restoreState() {
  const [name, ...parts] = location.hash.slice(1).split("/");
  const [epoch, [kind, number], place] = count(3, k => (parts[k] ?? "").split("-"));
  const known = names().find(known => encodeURIComponent(known) === name) ?? names()[0];
  showNetwork(known, epoch[1], kind, number - 1);
  const {net} = state, layer = net.layers.find(layer => layer.name === place[0]);
  const [map, a, b] = place.slice(1).map(number => number - 1);
  if (!(map < layer?.after.maps)) return;
  const {height, width, area} = layer.after;
  if (area === 1) select({layer, i: map}, true);
  else if (a < height && b < width) select({layer, i: indexOf(layer.after, map, a, b)}, true);
  if (layer === lastLayer() && net.classes[a]) compare(map, a);
}

// --- Start ---------------------------------------------------------------------------------------

const dataOf = selector => [...document.querySelectorAll(`script[data-network]${selector}`)];
const names = () => dataOf("[type='application/json']").map(({dataset}) => dataset.network);
const TYPES = {float32: Float32Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array};

// Decode the network of a dataset from the elements at the end of the page.
function readNetwork(name) {
  const arrays = {}, all = dataOf("").filter(({dataset}) => dataset.network === name);
  const [first, ...others] = all;
  for (const {dataset: {array, type}, textContent} of others) {
    const text = atob(textContent), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    arrays[array] = new TYPES[type](bytes.buffer);
  }
  return {name, ...makeNetwork(JSON.parse(first.textContent), arrays)};
}

// Show a network, with an epoch (its number) and an input if the page has them.
function showNetwork(name, number, kind, n) {
  const net = networks[name] ??= readNetwork(name), index = net.epochs.indexOf(Number(number));
  const epoch = index < 0 ? net.final : index;
  const images = {image: net.images, error: epoch === net.final ? net.errors : []};
  const input = images[kind]?.[n] || kind === "drawing" ? {kind, n} : {kind: "image", n: 0};
  const isNew = net !== state.net;
  clearInterval(timers.slide);
  Object.assign(state, {net, value: null, pinned: false, slide: false, cell: null, ...input});
  for (const button of element("datasets").children)
    button.ariaPressed = button.textContent === name;
  document.querySelector("main").hidden = false;
  document.body.style.setProperty("--epochs", net.epochs.length);
  element("training").hidden = !net.final;
  element("epoch").max = net.final;
  if (isNew) {
    buildLayers();
    buildStrip();
    arrange();
  }
  buildImages(galleryOf(input.kind));
  showImage();
  pause();
  setEpoch(epoch);
  if (epoch === net.final && input.kind === "image") checkResults(input.n, valuesOf(lastLayer()));
  if (!net.checked) runImages();
}

function start() {
  const pointers = ["onpointerdown", "onpointermove", "onpointerup", "onlostpointercapture"];
  for (const type of pointers) element("drawing")[type] = followPointer;
  element("drawing").onkeydown = movePen;
  element("images").onkeydown = moveFocus;
  element("strip").onkeydown = moveFocus;
  element("centered").onchange = () => { if (state.kind === "drawing") readPad(); };
  element("epoch").oninput = ({target}) => {
    pause();
    setEpoch(Number(target.value));
  };
  const clicks = {
    clear: () => setImage("drawing"),
    "show-images": () => setImage("image"),
    "show-errors": () => setImage("error"),
    unpin: () => pin(state.value),
    "play-slide": () => (state.slide ? pauseSlide() : startSlide()),
    play: () => (timers.play ? pause() : play()),
    "start-tour": () => goToStep(1),
    "tour-back": () => goToStep(state.tour - 1),
    "tour-next": () => goToStep(state.tour + 1),
    "tour-close": () => goToStep(-1),
  };
  for (const [id, onclick] of Object.entries(clicks)) element(id).onclick = onclick;
  document.onkeydown = ({key}) => { if (key === "Escape" && state.pinned) pin(state.value); };
  window.onhashchange = () => { if (location.hash !== address()) restoreState(); };
  window.onresize = arrange;
  fill(element("datasets"), ...names().map(name =>
    make("button", {onclick: () => showNetwork(name)}, name)));
  const visited = location.hash;
  restoreState();
  if (!visited) goToStep(0); // offer the tour
}

addEventListener("DOMContentLoaded", start);
