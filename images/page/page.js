"use strict";

// Draw the networks in this file, and respond to the reader.

const state = {
  net: null,
  views: [], // the pictures of all layers but the last
  epoch: 0, // index in net.epochs
  n: 0, // index of the input in net.images; -1: a drawing
  image: null, // the input, 28x28, 0 to 255; null: nothing is drawn
  steps: null, // what `forward` returns for it
  value: null, // the value that is explained
  boxes: [], // its receptive field in each layer
  pinned: false, // whether it stays when the pointer moves on
  rival: null, // the class to compare with, if the value is a class
  opened: new Set(), // keys of the details that are open
  slide: false, // whether the window of the value slides
  cell: null, // the class whose confusions are shown
  tour: -1, // index of the current step; 0 offers the tour
  stroke: null, // last point of the current stroke
};
const networks = {}; // by name, once they are read
const timers = {}; // by purpose
const element = id => document.getElementById(id);
const pad = element("drawing").getContext("2d", {willReadFrequently: true});
const lastLayer = () => state.net.layers.at(-1);
const valuesOf = layer => state.steps[layer.index].at(-1);
const labelOfInput = () => state.net.images[state.n]?.label; // of a drawing: undefined

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
  return [shade, shade, shade, 255];
};

// Blue below 0, white at 0, red above; never so dark that black text on it is hard to read.
function diverging(most) {
  return value => {
    const amount = Math.min(1, Math.abs(value) / (most || 1)), rest = 255 - 155 * amount;
    return value < 0 ? [rest, 255 - 115 * amount, 255, 255] : [255 - 5 * amount, rest, rest, 255];
  };
}

// Draw one value for each pixel, or those whose indices `pixels` has. Others stay transparent.
function paint(canvas, values, color, pixels) {
  const image = new ImageData(canvas.width, canvas.height), {data} = image;
  for (let pixel = 0; pixel < data.length / 4; pixel++) {
    const value = values[pixels ? pixels[pixel] : pixel];
    if (value !== undefined) data.set(color(value), 4 * pixel);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// A canvas with one pixel for each value. The style sheet enlarges it.
function picture({height, width}, values, color) {
  return paint(make("canvas", {height, width}), values, color);
}

function placeFrame(frame, box, {height, width}) {
  const whole = {left: width, top: height, width, height};
  for (const side in whole) frame.style[side] = `${(100 * box[side]) / whole[side]}%`;
  return frame;
}

// --- Views ---------------------------------------------------------------------------------------

// A picture of some maps of a layer, in columns of `rows` maps, with a gap of one pixel. A value is
// `zoom` pixels wide and high. For each pixel, `pixels` has the index of a value, or -1 in gaps.
function makeView(layer, maps, rows = 1, zoom = 1) {
  const {after} = layer, down = after.height * zoom + 1, across = after.width * zoom + 1;
  const height = rows * down - 1, width = Math.ceil(maps.length / rows) * across - 1;
  const pixels = Int32Array.from({length: height * width}, (_, p) => {
    const y = Math.floor(p / width), x = p % width;
    const map = maps[Math.floor(x / across) * rows + Math.floor(y / down)];
    const [row, column] = [y % down, x % across].map(place => Math.floor(place / zoom));
    const gap = map === undefined || row === after.height || column === after.width;
    return gap ? -1 : indexOf(after, map, row, column);
  });
  const canvas = make("canvas", {height, width}), frames = make("div", {});
  const root = make("div", {className: "view"}, canvas, frames);
  return {layer, zoom, height, width, pixels, canvas, frames, root};
}

function paintView({canvas, layer, pixels}, values = valuesOf(layer)) {
  paint(canvas, values, gray(layer.range), pixels);
}

// Frame a box of rows and columns in some maps. A box of all values is outlined instead.
function frameView({layer: {after}, zoom, pixels, frames, root, ...size}, box) {
  const {first, last, top, left, height, width} = box ?? {first: 0, last: -1};
  const all = (last - first + 1) * height * width === after.size;
  const starts = count(all ? 0 : last - first + 1, n =>
    pixels.indexOf(indexOf(after, first + n, top, left)));
  root.classList.toggle("marked", all);
  fill(frames, ...starts.filter(start => start >= 0).map(start => placeFrame(make("i", {}), {
    left: start % size.width, top: Math.floor(start / size.width),
    width: width * zoom, height: height * zoom,
  }, size)));
}

// Let the pointer and the arrow keys select the values of a view.
function makeSelectable(view, ariaLabel) {
  const at = ({offsetX, offsetY}) => {
    const {clientWidth, clientHeight} = view.canvas;
    const x = clamp(Math.floor((offsetX / clientWidth) * view.width), 0, view.width - 1);
    const y = clamp(Math.floor((offsetY / clientHeight) * view.height), 0, view.height - 1);
    const i = view.pixels[y * view.width + x];
    return i < 0 ? null : {layer: view.layer, i};
  };
  const onkeydown = event => moveValue(view, event);
  const properties = {tabIndex: 0, role: "application", ariaLabel, onkeydown, ...onPointer(at)};
  return Object.assign(view.root, properties);
}

const onPointer = at => ({
  onpointermove: event => {
    const value = event.pointerType === "mouse" && at(event);
    if (value && !state.pinned && !isSelected(value)) select(value, false);
  },
  onclick: event => pin(at(event)),
});

const ARROWS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};

// An arrow key selects the next value in its direction, or the first one of the view.
function moveValue({layer, pixels, height, width}, event) {
  const arrow = ARROWS[event.key], inside = state.value?.layer === layer;
  if (event.key === "Enter" && inside) pin(state.value);
  if (!arrow) return;
  event.preventDefault();
  const last = inside ? state.value.i : -1, start = pixels.indexOf(last);
  let y = Math.floor(start / width), x = start % width, i = inside ? last : pixels[0];
  while (i === last || i < 0) {
    [y, x] = [y + arrow[0], x + arrow[1]];
    if (y < 0 || x < 0 || y === height || x === width) return;
    i = pixels[y * width + x];
  }
  slide(false);
  select({layer, i}, state.pinned);
  element("spoken").textContent = element("title").textContent;
}

// --- Layers --------------------------------------------------------------------------------------

const NAMES = {conv2d: "Convolution", avg_pool2d: "Average pooling", max_pool2d: "Max pooling",
  linear: "Fully connected", input: "Image"};

function sizeOf({maps, height, width, area}) {
  if (area === 1) return `${maps} units`;
  return maps === 1 ? `${height}×${width}` : `${maps} maps of ${height}×${width}`;
}

// The name of a layer, its size and its operations.
function titleOf({name, after, explained: [{op, attributes}, ...others]}) {
  let does = NAMES[op] + (attributes.kernel_size ? ` ${attributes.kernel_size.join("×")}` : "");
  const later = new Set(others.map(other => other.op.replaceAll("_", " ")));
  if (later.size) does += `, then ${[...later].join(", ")}`;
  return make("figcaption", {}, make("b", {}, name), span("", sizeOf(after)), span("", does));
}

// Make a figure for each layer but the last, whose values are the list of classes.
function buildLayers() {
  const last = lastLayer(), widths = [];
  state.views = [];
  const figures = state.net.layers.slice(0, -1).map(layer => {
    const {maps, height, width, area} = layer.after, zoom = area > 1 ? 1 : 6;
    const scale = area > 1 ? 2.4 + 20 / Math.max(height, width) : 2.6; // on the screen
    const most = Math.max(1, Math.floor(560 / ((height * zoom + 1) * scale))); // in a column
    const rows = Math.ceil(maps / Math.ceil(maps / most));
    const view = makeView(layer, count(maps, map => map), rows, zoom);
    const label = `${layer.name}, ${sizeOf(layer.after)}. Arrow keys select a value; Enter pins it`;
    const [low, high] = layer.range.map(value => show(value, Math.min(2, layer.decimals)));
    state.views.push(view);
    widths.push(Math.ceil(view.width * scale));
    return make("figure", {style: `--width: ${widths.at(-1)}`}, titleOf(layer),
      make("div", {className: "scale"}, low, make("i", {}), high), makeSelectable(view, label));
  });
  const columns = widths.map(width => `minmax(64px, ${width}fr)`).join(" ");
  const room = widths.map(width => `max(72px, ${width} * var(--unit) + 8px)`).join(" + ");
  element("layers").style.cssText = `--columns: ${columns}; --room: calc(${room})`;
  fill(element("layers"), ...figures);
  element("output").querySelector("figcaption").replaceWith(titleOf(last));
  fill(element("classes"), ...state.net.classes.map((name, i) => make("li", {}, make("button",
    onPointer(() => ({layer: last, i})), span("name", name), span("share"), span("number")))));
}

// Outline the values from which the selected value is computed.
function outlineLayers() {
  const {value, boxes, views} = state;
  for (const view of views) frameView(view, boxes[view.layer.index]);
  [...element("classes").children].forEach((item, i) =>
    item.classList.toggle("marked", value?.layer === lastLayer() && value.i === i));
}

// --- The explanation of a value ------------------------------------------------------------------

const mapName = ({name, after: {maps}}, map) => (maps > 1 ? `${name}, map ${map + 1}` : name);

function valueName({layer, i}) {
  const {after, name} = layer, {map, row, column} = coordinates(after, i);
  if (layer === lastLayer()) return `${name}, score of ${state.net.classes[i]}`;
  if (after.area === 1) return `${name}, unit ${map + 1}`;
  return `${mapName(layer, map)}, row ${row + 1}, column ${column + 1}`;
}

// Details that stay open when the panel is filled again. Their content is made when they open.
function details(key, summary, content) {
  const open = state.opened.has(key);
  const ontoggle = ({target}) => {
    if (target.open === open) return;
    state.opened[target.open ? "add" : "delete"](key);
    renderPanel();
  };
  return make("details", {open, ontoggle}, make("summary", {key}, ...summary),
    ...(open ? content() : []));
}

function grid(values, columns, color, decimals, title) {
  const cells = values.map(value => {
    const shade = Uint8ClampedArray.from(color(value)).subarray(0, 3);
    const text = Math.max(...shade) < 118 ? "white" : "black";
    const style = `background: rgb(${shade}); color: ${text}`;
    return make("span", {style}, show(value, decimals).replace(/^(−?)0\./, "$1."));
  });
  const style = `grid-template-columns: repeat(${columns}, auto)`;
  return make("figure", {}, caption(title), make("div", {className: "grid", style}, ...cells));
}

function renderPanel() {
  const {net, value, pinned, steps} = state;
  element("hint").hidden = Boolean(value);
  element("selected").hidden = !value;
  if (!value) return;
  const {layer, i} = value, explained = explain(net, steps, value);
  const rows = explained.flatMap(step => RENDER[step.kind](step, layer));
  const difference = pinned && layer === lastLayer() && canCompare(net) ? renderDifference(i) : [];
  const maps = pinned && layer.index && layer.after.area > 1 ? renderMaps(value, explained[0]) : [];
  element("title").textContent = `${valueName(value)}: ${show(valuesOf(layer)[i], layer.decimals)}`;
  element("unpin").textContent = pinned ? "Unpin (Esc)" : "Pin";
  element("slide").hidden = !maps.length;
  element("play-slide").textContent = state.slide ? "❚❚ Pause" : "▶ Slide the window";
  fill(element("maps"), ...maps);
  fill(element("explanation"), ...difference, ...rows);
}

const RENDER = {
  line: ({text, total}) => [row(text, total)],
  pool({map, values, max, by, total, result, digits}, layer) {
    const source = state.net.layers[layer.index - 1], end = show(result, digits.result);
    const columns = Math.min(layer.windows.kernel[1], values.length);
    const cells = grid(values, columns, gray(source.range), digits.inputs, mapName(source, map));
    const average = `Average: sum ${show(total, digits.inputs)} ÷ ${by}`;
    return [cells, row(max ? `Largest of ${values.length}` : average, end)];
  },
  sum(step, layer) {
    const {name} = state.net.layers[layer.index - 1];
    const windows = step.terms[0].window.length > 1;
    const terms = windows ? `Windows of ${name} × kernels` : `Values of ${name} × weights`;
    const title = `${terms}, strongest first (red adds, blue subtracts)`;
    const total = show(step.total, step.digits.result);
    return [caption(title), ...sumRows(step, layer), row("Sum", total)];
  },
};

// The terms of a sum, with bars. All but the largest eight are folded away.
function sumRows({terms, bias, rounding, digits}, layer) {
  const others = terms.slice(8), rest = sum(others.map(({total}) => total));
  const longest = maxAbs([terms[0].total, rest, bias ?? 0]) || 1;
  const bar = number => {
    const style = `width: ${(100 * Math.abs(number)) / longest}%`;
    const filled = make("i", {className: number < 0 ? "minus" : "plus", style});
    return [span("bar", filled), span("number", show(number, digits.result))];
  };
  const line = (name, number) =>
    make("p", {className: "term"}, span("wide name", name), ...bar(number));
  const draw = terms[0].window.length > 1 ? mapTerm : unitTerm;
  const drawn = list => list.map(term => draw({...term, digits, bar: bar(term.total)}, layer));
  const rows = drawn(terms.slice(0, 8));
  if (others.length) {
    const summary = [span("wide name", `${others.length} smaller terms together`), ...bar(rest)];
    rows.push(details("others", summary, () => drawn(others)));
  }
  if (bias !== null) rows.push(line("Bias", bias));
  if (rounding) rows.push(line("Rounding of the products", rounding));
  return rows;
}

// One value times one weight. A click selects the value.
function unitTerm({indices: [i], window, kernel, digits, bar}, {index}) {
  const value = {layer: state.net.layers[index - 1], i}, onclick = () => select(value, true);
  const weight = inParentheses(show(kernel[0], digits.weights));
  return make("p", {className: "unit term", onclick},
    span("name", valueName(value).replace(/.*?, /, "")),
    span("product", `${show(window[0], digits.inputs)} × ${weight}`), ...bar);
}

// A window of one map times a kernel. It opens to show all numbers.
function mapTerm({map, window, kernel, products, total, digits, bar}, {index, windows}) {
  const shape = {height: windows.kernel[0], width: windows.kernel[1]};
  const source = state.net.layers[index - 1];
  const shade = gray(source.range), color = diverging(maxAbs(kernel)), name = mapName(source, map);
  const cells = (values, ...how) => grid(values, shape.width, ...how);
  const equation = () => [make("div", {className: "equation"},
    cells(window, shade, digits.inputs, name),
    span("", "× ", cells(kernel, color, digits.weights, "kernel")),
    span("", "= ", cells(products, diverging(maxAbs(products)), digits.result,
      `products, in total ${show(total, digits.result)}`)))];
  const title = span(state.pinned ? "name" : "wide name", name.replace(/.*, /, ""));
  if (!state.pinned) return make("p", {className: "term"}, title, ...bar); // pictures would be slow
  const pictures = [picture(shape, window, shade), " × ", picture(shape, kernel, color)];
  return details(`map ${map}`, [title, span("product", ...pictures), ...bar], equation);
}

// Which units make the network prefer one class to another.
function renderDifference(first) {
  const {net, steps} = state, {classes} = net, second = state.rival ?? rivalOf(first);
  const step = explainDifference(net, steps, first, second);
  const options = classes.map((name, i) => new Option(name, i, false, i === second));
  options.splice(first, 1);
  const choice = make("select", {key: "rival", ariaLabel: "Class to compare with"}, ...options);
  choice.onchange = () => select(state.value, true, Number(choice.value));
  const [name, other] = [classes[first], classes[second]];
  const text = `Values × differences of weights: red speaks for ${name}, blue for ${other}`;
  const question = step.total < 0 ? `Why not ${name}, but ` : `Why ${name} and not `;
  return [make("h3", {}, question, choice, "?"), caption(text),
    ...sumRows(step, lastLayer()),
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

// The map of a value and a map that it sees (an opened one, or the first), enlarged. While the
// window slides, the map fills in.
function renderMaps({layer, i}, {terms = []}) {
  const {net, boxes} = state, source = net.layers[layer.index - 1];
  const enlarge = (layer, map, arrow, values) => {
    const view = makeView(layer, [map]);
    paintView(view, values);
    frameView(view, boxes[layer.index]);
    return [view, make("figure", {}, caption(arrow + mapName(layer, map)), view.root)];
  };
  const own = coordinates(layer.after, i).map, done = state.slide ? i + 1 : layer.after.size;
  const [result, figure] = enlarge(layer, own, "→ ", valuesOf(layer).subarray(0, done));
  makeSelectable(result, `${mapName(layer, own)}, enlarged. Arrow keys move the window`);
  result.root.dataset.key = "result";
  const seen = terms.find(({map}) => state.opened.has(`map ${map}`));
  return [enlarge(source, seen?.map ?? boxes[source.index].first, "")[1], figure];
}

// Slide from the first position of the map to the last, or stop.
function slide(on) {
  if (state.slide === on) return;
  state.slide = on;
  clearInterval(timers.slide);
  if (!on) return select(state.value, state.pinned);
  const {layer, i} = state.value, {area} = layer.after, step = Math.ceil(area / 400);
  const next = () => {
    if (state.value.i % area >= area - step) slide(false);
    else select({layer, i: state.value.i + step}, true);
  };
  timers.slide = setInterval(next, clamp(12000 / area, 30, 250));
  select({layer, i: i - (i % area)}, true);
}

// --- Test images ---------------------------------------------------------------------------------

const isError = n => n >= state.net.samples; // after the random images come errors

// Make a radio button for each test image.
function buildImages() {
  fill(element("images"), ...state.net.images.map(({image}, n) =>
    make("label", {}, make("input", {type: "radio", name: "image", onchange: () => setImage(n)}),
      picture(IMAGE, image, gray([0, 255])))));
}

// Say of each what the image is, and what the network of this epoch takes it for.
function labelImages() {
  const {n, net: {classes, images, final, samples}, epoch} = state, counts = classes.map(() => 0);
  const errors = isError(n);
  [...element("images").children].forEach((choice, k) => {
    const {label, answers} = images[k], wrong = answers[epoch] !== label;
    const title = `${classes[label]} ${++counts[label]}`
      + (wrong ? `, classified as ${classes[answers[epoch]]}` : "");
    Object.assign(choice, {title, className: wrong && "wrong", hidden: isError(k) !== errors});
    Object.assign(choice.firstChild, {ariaLabel: title, checked: k === n});
  });
  element("show-images").ariaPressed = !errors;
  element("show-errors").ariaPressed = errors;
  element("images-note").textContent = errors
    ? "Test images that the final network misclassifies, chosen at random:"
    : "Draw above, or pick a test image. Each row shows ten images of one class, chosen at random:";
  element("show-errors").disabled = epoch !== final || samples === images.length;
}

// --- The input and the answer --------------------------------------------------------------------

// Take test image n as the input, or start a drawing (-1).
function setImage(n) {
  const {width, height} = PAD, image = state.net.images[n]?.image ?? null;
  Object.assign(state, {n, image});
  pad.clearRect(0, 0, width, height);
  pad.imageSmoothingEnabled = false;
  if (image) pad.drawImage(picture(IMAGE, image, gray([0, 255])), 0, 0, width, height);
  element("crop").hidden = true;
  labelImages();
  update();
}

// Compute all layers for the input, and show them.
function update() {
  const {net, epoch, image, n} = state;
  state.steps = forward(net, image);
  const wrong = n >= 0 && epoch === net.final && !agrees(net, n, valuesOf(lastLayer()));
  element("problem").hidden = !wrong;
  document.querySelector("main").hidden = wrong;
  state.views.forEach(view => paintView(view));
  renderAnswer();
  clearTimeout(timers.panel);
  if (state.stroke) timers.panel = setTimeout(renderPanel, 100); // when the pen rests: it is slow
  else renderPanel();
  saveState();
}

function renderAnswer() {
  const {net, image, n, steps, stroke} = state, {classes} = net;
  const chances = probabilities(net, steps), answer = argmax(chances), rival = rivalOf(answer);
  const label = labelOfInput() ?? answer, correct = answer === label;
  const verdict = correct ? "✓ Correct" : `✗ Wrong: it is ${classes[label]}`;
  element("answer").textContent = image ? classes[answer] : "";
  element("verdict").textContent = n < 0 ? "" : verdict;
  element("verdict").className = correct ? "" : "mistake";
  const why = image ? `Why ${classes[answer]} and not ${classes[rival]}?` : "Why?";
  Object.assign(element("why"), {hidden: !canCompare(net), disabled: !image, textContent: why});
  element("why").onclick = () => select({layer: lastLayer(), i: answer}, true, rival);
  [...element("classes").children].forEach(({firstChild: {children: [, bar, number]}}, i) => {
    bar.style.width = `${image ? 100 * chances[i] : 0}%`;
    number.textContent = image ? percent(chances[i]) : "";
  });
  const text = `${classes[answer]}, ${percent(chances[answer])}. ${element("verdict").textContent}`;
  if (image && !stroke && !timers.play) element("spoken").textContent = text; // to screen readers
}

// Draw a line through points on the pad. It replaces a test image.
function draw(points) {
  if (state.n >= 0) setImage(-1);
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
  const drawing = new Uint8Array(PAD.size);
  for (let i = 0; i < PAD.size; i++) drawing[i] = data[4 * i + 3]; // how opaque it is
  const box = boundingBox(PAD, drawing), centered = element("centered").checked;
  if (!box.width) state.image = null;
  else if (centered) state.image = cropAndCenter(drawing, box, state.net);
  else state.image = shrink(drawing, {top: 0, left: 0, ...PAD}, IMAGE);
  element("crop").hidden = !centered;
  placeFrame(element("crop"), box, PAD);
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

// --- Selecting a value ---------------------------------------------------------------------------

const isSelected = value => value.layer === state.value?.layer && value.i === state.value.i;

function pin(value) {
  slide(false);
  if (value) select(value, !(state.pinned && isSelected(value)));
  if (state.pinned && innerWidth < 760) element("panel").scrollIntoView({block: "nearest"});
}

// Explain a value, or none. If it is pinned, it stays. A class can have a rival.
function select(value, pinned, rival = value && isSelected(value) ? state.rival : null) {
  if (state.value?.layer !== value?.layer) {
    slide(false);
    state.opened = new Set();
    element("panel").scrollTop = 0;
  }
  const boxes = value ? receptiveField(state.net.layers, value) : [];
  Object.assign(state, {value, boxes, pinned, rival});
  outlineLayers();
  renderPanel();
  if (!state.slide) saveState(); // browsers limit how often it can be done
}

// --- Training ------------------------------------------------------------------------------------

function setEpoch(epoch, n = state.n) {
  const {net} = state, number = net.epochs[epoch], final = epoch === net.final;
  const counts = net.classes.map((_, label) => confusions(net, epoch, label));
  const total = sum(counts.map(sum)), correct = sum(counts.map((row, label) => row[label]));
  const stage = number ? `Epoch ${number}${final ? " (final)" : ""}` : "Before training";
  const all = total.toLocaleString("en");
  const text = `${stage}: ${percent(correct / total)} of ${all} test images correct`;
  if (final) play(false);
  state.epoch = epoch;
  useWeights(net, epoch);
  element("when").textContent = text;
  element("epoch").value = epoch;
  element("epoch").setAttribute("aria-valuetext", text);
  labelStrip();
  const next = isError(n) && !final ? 0 : n; // the errors are those of the final epoch
  if (next !== state.n) return setImage(next);
  labelImages();
  update();
}

// Play the training, to its end, or stop.
function play(on) {
  element("play").textContent = on ? "❚❚ Pause" : "▶ Play the training";
  clearInterval(timers.play);
  timers.play = on ? setInterval(() => setEpoch(state.epoch + 1), 900) : null;
  if (on && state.epoch === state.net.final) setEpoch(0);
}

// Make a table with the accuracy of each class in each epoch, on all test images.
function buildStrip() {
  const {net, net: {classes, epochs}} = state;
  const cell = (name, label) => (number, epoch) => {
    const counts = confusions(net, epoch, label), accuracy = counts[label] / (sum(counts) || 1);
    const title = `${name}, epoch ${number}: ${percent(accuracy, 0)} correct`;
    const className = accuracy > 0.72 ? "high" : "", style = `--accuracy: ${accuracy}`;
    const onchange = () => {
      play(false);
      state.cell = label;
      setEpoch(epoch);
    };
    return make("label", {title, className, style}, show(100 * accuracy, 0),
      make("input", {type: "radio", name: "cell", ariaLabel: title, onchange}));
  };
  fill(element("strip"), span("name", "Epoch"), ...epochs.map(number => span("", number)),
    ...classes.flatMap((name, label) => [span("name", name), ...epochs.map(cell(name, label))]));
}

// Mark the current epoch in the table, and add what the class of the selected cell is taken for.
function labelStrip() {
  const {net, net: {classes, epochs}, epoch, cell} = state;
  element("strip").querySelectorAll("label").forEach((choice, i) => {
    const now = i % epochs.length === epoch;
    choice.classList.toggle("now", now);
    choice.lastChild.checked = now && Math.floor(i / epochs.length) === cell;
  });
  if (cell === null) return fill(element("confused"));
  const counts = epochs.map((_, k) => confusions(net, k, cell)), now = counts[epoch];
  const others = [...now.keys()].filter(label => label !== cell);
  const title = `${classes[cell]}, epoch ${epochs[epoch]}: ${now[cell]} of ${sum(now)} test images `
    + "correct. In each epoch, the others were classified as:";
  fill(element("confused"), make("p", {}, title), ...others.flatMap(label =>
    [span("name", classes[label]), ...counts.map(row => span("", row[label]))]));
}

// --- The tour ------------------------------------------------------------------------------------

// Select the value with the highest score in the first layer with maps that has an operation.
function selectExample(op, score) {
  const layer = state.net.layers.find(({operations: [first], windows, after}) =>
    first.op.endsWith(op) && windows.slides && after.area > 1);
  select(layer ? {layer, i: argmax(valuesOf(layer).map(score))} : null, Boolean(layer));
  return layer;
}

// What the steps of the tour show on the current image.
const EXAMPLES = {
  draw: () => select(null, false),
  window: () => selectExample("conv2d", value => value),
  slide: () => selectExample("conv2d", value => value) && slide(true),
  pool: () => selectExample("pool2d", value => -Math.abs(value - 0.5)), // a mixed window
  answer: () => element("why").onclick(),
  training() {
    select(null, false);
    setEpoch(0);
    timers.play = setTimeout(play, 3000, true); // time to read
  },
};

function goToStep(step) {
  const steps = [...element("tour").querySelectorAll("p")], {net, image} = state;
  state.tour = step;
  element("tour").hidden = !steps[step];
  steps.forEach((text, k) => { text.hidden = k !== step; });
  element("tour-back").hidden = step === 0;
  element("tour-next").textContent = ["Start the tour", ...Array(5).fill("Next"), "Finish"][step];
  if (!steps[step] || !step) return; // it is over, or only offered
  slide(false);
  play(false);
  const {example, look} = steps[step].dataset;
  if (state.epoch !== net.final) setEpoch(net.final);
  if (!image) setImage(0);
  EXAMPLES[example]();
  element("tour-next").focus({preventScroll: true});
  if (innerWidth < 760) element(look).scrollIntoView();
}

// --- The address ---------------------------------------------------------------------------------

// The state as #MNIST/epoch-8/image-33/C3-2-6-6: map, row and column. Units have one number, and
// classes that are compared two.
function saveState() {
  const {net, epoch, n, value, pinned, rival} = state;
  const parts = [encodeURIComponent(net.name), `epoch-${net.epochs[epoch]}`,
    n < 0 ? "drawing" : `image-${n + 1}`];
  if (pinned) {
    const {layer, i} = value, {map, row, column} = coordinates(layer.after, i);
    const numbers = layer.after.area > 1 ? [map, row, column] : [map];
    if (rival !== null) numbers.push(rival);
    parts.push([layer.name, ...numbers.map(number => number + 1)].join("-"));
  }
  const address = `#${parts.join("/")}`;
  if (location.hash !== address) history.replaceState(null, "", address);
}

// Show what the address says. What this page does not have is left out.
function restoreState() {
  const [name, ...parts] = location.hash.slice(1).split("/");
  const [epoch, image, place] = count(3, k => (parts[k] ?? "").split("-"));
  const known = names().find(known => encodeURIComponent(known) === name) ?? names()[0];
  const n = image[0] === "drawing" ? -1 : (Number(image[1]) || NaN) - 1;
  showNetwork(known, Number(epoch[1]), n);
  const {net} = state, layer = net.layers.find(layer => layer.name === place[0]);
  const [map, a, b] = place.slice(1).map(number => number - 1);
  if (!(map < layer?.after.maps)) return;
  const {height, width, area} = layer.after;
  if (area === 1) select({layer, i: map}, true);
  else if (a < height && b < width) select({layer, i: indexOf(layer.after, map, a, b)}, true);
  if (layer === lastLayer() && net.classes[a] && a !== map) select({layer, i: map}, true, a);
}

// --- Start ---------------------------------------------------------------------------------------

const dataOf = selector => [...document.querySelectorAll(`script[data-network]${selector}`)];
const names = () => dataOf("[type='application/json']").map(({dataset}) => dataset.network);
const TYPES = {float32: Float32Array, int32: Int32Array, int8: Int8Array, uint8: Uint8Array};

// Decode the network of a dataset from the elements at the end of the page.
function readNetwork(name) {
  const [first, ...others] = dataOf("").filter(({dataset}) => dataset.network === name);
  const arrays = {};
  for (const {dataset: {array, type}, textContent} of others) {
    const text = atob(textContent);
    const bytes = new Uint8Array(text.length).map((_, i) => text.charCodeAt(i));
    arrays[array] = new TYPES[type](bytes.buffer);
  }
  return {name, ...makeNetwork(JSON.parse(first.textContent), arrays)};
}

// Show a network, with an epoch (its number) and an input if the page has them.
function showNetwork(name, number, n) {
  const net = networks[name] ??= readNetwork(name), index = net.epochs.indexOf(number);
  const isNew = net !== state.net;
  slide(false);
  play(false);
  Object.assign(state, {net, n: null, value: null, boxes: [], pinned: false, cell: null});
  for (const button of element("datasets").children)
    button.ariaPressed = button.textContent === name;
  document.body.style.setProperty("--epochs", net.epochs.length);
  element("training").hidden = !net.final;
  element("epoch").max = net.final;
  if (isNew) {
    buildLayers();
    buildStrip();
    buildImages();
  }
  outlineLayers();
  setEpoch(index < 0 ? net.final : index, net.images[n] || n === -1 ? n : 0);
}

function start() {
  const pointers = ["onpointerdown", "onpointermove", "onpointerup", "onlostpointercapture"];
  for (const type of pointers) element("drawing")[type] = followPointer;
  element("centered").onchange = () => { if (state.n < 0) readPad(); };
  element("epoch").oninput = ({target}) => {
    play(false);
    setEpoch(Number(target.value));
  };
  const clicks = {
    clear: () => setImage(-1),
    "show-images": () => setImage(0),
    "show-errors": () => setImage(state.net.samples),
    unpin: () => pin(state.value),
    "play-slide": () => slide(!state.slide),
    play: () => play(!timers.play),
    "start-tour": () => goToStep(1),
    "tour-back": () => goToStep(state.tour - 1),
    "tour-next": () => goToStep(state.tour + 1),
    "tour-close": () => goToStep(-1),
  };
  for (const [id, onclick] of Object.entries(clicks)) element(id).onclick = onclick;
  document.onkeydown = ({key}) => { if (key === "Escape" && state.pinned) pin(state.value); };
  window.onhashchange = restoreState;
  fill(element("datasets"), ...names().map(name =>
    make("button", {onclick: () => showNetwork(name)}, name)));
  if (!location.hash) goToStep(0); // offer the tour
  restoreState();
}

addEventListener("DOMContentLoaded", start);
