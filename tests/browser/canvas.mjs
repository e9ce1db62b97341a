// Opens workflows in ComfyUI's real canvas, in Chromium, and says what it saw there, as JSON on standard output.
//
//     node canvas.mjs JOB.json
//
// JOB: {playwright: path of playwright-core, chromium: its executable, url: the server,
//       workflows: [{name, graph, vue, run}], small: {node class: {widget: value}}, files: {workflow: {class: {...}}},
//       templates: [names], pictures: a folder, or nothing}.
// With `vue`, nodes are drawn as DOM elements ("Nodes 2.0") and not on the canvas. With `run`, the workflow is queued
// after the values in `small` and `files` were put into its widgets, and what is seen is told once more (`after`). With
// `pictures`, each canvas is pictured there as it was loaded and after its run.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(import.meta.url)(job.playwright);
const FLAGS = [
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
const START_MS = 120_000;
const RUN_MS = 180_000;
const SETTLE_MS = 700; // until sizes that follow from what is shown are taken
const PICTURE_WIDTH = 2560;
const PICTURE_SETTINGS = { "Comfy.Graph.CanvasInfo": false, "LiteGraph.Canvas.MinFontSizeForLOD": 0 };
const ONLY_THE_CANVAS = `body * { visibility: hidden !important }
  #graph-canvas, [data-node-id], [data-node-id] *, .dom-widget, .dom-widget * { visibility: visible !important }`;
const REFUSED_POLLS = 12; // polls with nothing queued and nothing done: the server did not take the prompt

async function openCanvas(page, vue) {
  await page.goto(job.url);
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.NavaSampler, null, {
    timeout: START_MS,
  });
  await page.evaluate(
    (on) => window.app.ui.settings.setSettingValueAsync("Comfy.VueNodes.Enabled", on),
    Boolean(vue),
  );
  await page.waitForTimeout(1000); // the page's own default graph comes a moment later
}

// Loads a graph, lets the canvas settle, and reports what a person would see.
async function load(page, graph) {
  await page.evaluate((given) => window.app.loadGraphData(given, true, true), graph);
  await page.waitForTimeout(1000);
  return page.evaluate(async () => {
    const { app, LiteGraph } = window;
    const nodes = app.graph._nodes;
    const missing = nodes.filter((node) => !LiteGraph.registered_node_types[node.type]).map((node) => node.type);
    const dialogs = [...document.querySelectorAll("[role=dialog]")].map((dialog) => dialog.innerText.slice(0, 300));
    return { missing, dialogs, prompt: (await app.graphToPrompt()).output, count: nodes.length };
  });
}

// Moves the view so that all of the graph is seen: nodes outside of it are not laid out. Says the graph's shape.
function showAll({ width, height }) {
  const { canvas, graph } = window.app;
  const rims = [...graph._nodes, ...graph._groups].map((each) => each.boundingRect);
  const left = Math.min(...rims.map((rim) => rim[0])) - 20;
  const top = Math.min(...rims.map((rim) => rim[1])) - 20;
  const right = Math.max(...rims.map((rim) => rim[0] + rim[2])) + 20;
  const bottom = Math.max(...rims.map((rim) => rim[1] + rim[3])) + 20;
  canvas.ds.scale = Math.min(width / (right - left), height / (bottom - top));
  canvas.ds.offset = [-left, -top];
  canvas.setDirty(true, true);
  return (bottom - top) / (right - left);
}

// Overlapping nodes, crossing links and nodes that leave their group, from the sizes and places that they really have.
function drawing() {
  const graph = window.app.graph;
  const { scale, offset } = window.app.canvas.ds;
  const origin = window.app.canvas.canvas.getBoundingClientRect();
  const box = ({ id, boundingRect: [x, y, w, h] }) => {
    const element = document.querySelector(`[data-node-id="${id}"]`);
    if (!element) return [x, y, x + w, y + h];
    const parts = [element, ...element.querySelectorAll("button")].map((part) => part.getBoundingClientRect()); // its foot hangs out
    const rims = parts.filter((part) => part.width);
    const at = (px, py) => [(px - origin.x) / scale - offset[0], (py - origin.y) / scale - offset[1]];
    return [
      ...at(Math.min(...rims.map((rim) => rim.left)), Math.min(...rims.map((rim) => rim.top))),
      ...at(Math.max(...rims.map((rim) => rim.right)), Math.max(...rims.map((rim) => rim.bottom))),
    ];
  };
  const nodes = graph._nodes.map((node) => ({ node, box: box(node), title: `${node.title} (${node.id})` }));
  const frames = graph._groups.map(({ boundingRect: [x, y, w, h] }) => [x, y, x + w, y + h]);
  const inside = (a, b) => b[0] <= a[0] && b[1] <= a[1] && a[2] <= b[2] && a[3] <= b[3];
  const outside = nodes
    .filter(({ box: a }) => frames.filter((frame) => inside(a, frame)).length !== 1)
    .map(({ title, box: a }) => `${title} at ${a.map(Math.round)}`);
  const pairs = (list) => list.flatMap((a, i) => list.slice(i + 1).map((b) => [a, b]));
  const overlaps = pairs(nodes)
    .filter(([{ box: a }, { box: b }]) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3])
    .map(([a, b]) => `${a.title} and ${b.title}`);

  const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
  const curve = (a, c, d, b) =>
    Array.from({ length: 61 }, (_, i) => {
      const t = i / 60;
      const s = 1 - t;
      return [0, 1].map((k) => s ** 3 * a[k] + 3 * s * s * t * c[k] + 3 * s * t * t * d[k] + t ** 3 * b[k]);
    });
  // A link leaves to the right, enters from the left, and bends through its reroute points.
  const path = (link) => {
    const start = [...graph.getNodeById(link.origin_id).getOutputPos(link.origin_slot)];
    const end = [...graph.getNodeById(link.target_id).getInputPos(link.target_slot)];
    const stops = [];
    for (let id = link.parentId; id != null; id = stops[0].parentId) stops.unshift(graph.reroutes.get(id));
    const points = [];
    let from = start;
    let leave = null;
    stops.forEach((stop, i) => {
      const to = [...stop.pos];
      const next = stops[i + 1]?.pos ?? end;
      const out = leave ?? [from[0] + distance(from, to) / 4, from[1]];
      const bend = stop.controlPoint ?? [0, 0];
      points.push(...curve(from, out, [to[0] + bend[0], to[1] + bend[1]], to));
      const reach = Math.min(80, distance(to, next) / 4);
      leave = [to[0] + reach * stop.cos, to[1] + reach * stop.sin];
      from = to;
    });
    const far = distance(from, end) / 4;
    return [...points, ...curve(from, leave ?? [from[0] + far, from[1]], [end[0] - far, end[1]], end)];
  };
  const side = (a, b, c) => (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]);
  const cut = (a, b, c, d) => side(a, b, c) * side(a, b, d) < 0 && side(c, d, a) * side(c, d, b) < 0;
  const meet = (p, q) => p.some((_, i) => i && q.some((_, k) => k && cut(p[i - 1], p[i], q[k - 1], q[k])));
  const links = [...graph.links.values()].map((link) => ({ link, path: path(link) }));
  const crossings = pairs(links)
    .filter(([{ link: a }, { link: b }]) => a.origin_id !== b.origin_id || a.origin_slot !== b.origin_slot)
    .filter(([a, b]) => meet(a.path, b.path))
    .map((both) =>
      both.map(({ link }) => `${graph.getNodeById(link.origin_id).title} to ${graph.getNodeById(link.target_id).title}`),
    )
    .map(([a, b]) => `${a} with ${b}`);
  return { overlaps, crossings, outside };
}

async function look(page, name) {
  const { width, height } = page.viewportSize();
  await page.evaluate(showAll, { width, height });
  await page.waitForTimeout(SETTLE_MS);
  const seen = await page.evaluate(drawing);
  if (job.pictures) {
    for (const [setting, value] of Object.entries(PICTURE_SETTINGS))
      await page.evaluate((given) => window.app.ui.settings.setSettingValueAsync(...given), [setting, value]);
    const shape = await page.evaluate(showAll, { width, height });
    const tall = Math.round(PICTURE_WIDTH * shape);
    await page.setViewportSize({ width: PICTURE_WIDTH, height: tall });
    await page.evaluate(showAll, { width: PICTURE_WIDTH, height: tall });
    await page.addStyleTag({ content: ONLY_THE_CANVAS });
    await page.waitForTimeout(SETTLE_MS);
    await page.screenshot({ path: join(job.pictures, `${name}.png`) });
    await page.setViewportSize({ width, height });
  }
  return seen;
}

// Puts the small values into the widgets, presses Run, and waits for the server's word.
async function run(page, values) {
  const before = await page.evaluate(async () => Object.keys(await (await fetch("/history")).json()));
  await page.evaluate(async (small) => {
    for (const node of window.app.graph._nodes)
      for (const [name, value] of Object.entries(small[node.type] ?? {})) {
        const widget = node.widgets?.find((one) => one.name === name);
        if (widget) widget.value = value;
      }
    await window.app.queuePrompt(0, 1);
  }, values);
  const start = Date.now();
  for (let idle = 0; idle < REFUSED_POLLS && Date.now() - start < RUN_MS; await page.waitForTimeout(500)) {
    const { done, waiting } = await page.evaluate(async (known) => {
      const history = await (await fetch("/history")).json();
      const queue = await (await fetch("/queue")).json();
      const id = Object.keys(history).find((one) => !known.includes(one) && history[one].status?.status_str);
      return {
        done: id && { status: history[id].status, outputs: history[id].outputs },
        waiting: queue.queue_running.length + queue.queue_pending.length,
      };
    }, before);
    if (done) return done;
    idle = waiting ? 0 : idle + 1;
  }
  const refusal = await page.evaluate(() => document.body.innerText.match(/.*(error|invalid|required).*/i)?.[0]);
  return { status: { status_str: `nothing ran: ${refusal}` }, outputs: {} };
}

// The pack's own workflows in the template browser, with their pictures; the first is opened.
async function templates(page, names) {
  const fetched = {};
  page.on("response", (response) => {
    const name = response.url().match(/\/workflow_templates\/[^/]+\/(\w+)\.jpg/)?.[1];
    if (name) fetched[name] = response.status();
  });
  await openCanvas(page, false);
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.BrowseTemplates"));
  const search = page.locator("[role=dialog] input").first();
  await search.waitFor({ timeout: START_MS });
  const shown = {};
  const picture = page.locator("[role=dialog] img").first();
  for (const name of names) {
    await search.fill(name);
    await page.locator("[role=dialog]").getByText(name, { exact: true }).first().waitFor({ timeout: START_MS });
    await page.waitForTimeout(SETTLE_MS);
    await picture.waitFor({ timeout: START_MS });
    shown[name] = await picture.evaluate((image) => ({ width: image.naturalWidth, height: image.naturalHeight }));
    shown[name].status = fetched[name];
    if (job.pictures) await page.screenshot({ path: join(job.pictures, `template ${name}.png`) });
  }
  await search.fill(names[0]);
  await page.locator("[role=dialog]").getByText(names[0], { exact: true }).first().waitFor({ timeout: START_MS });
  await page.waitForTimeout(SETTLE_MS);
  await picture.click();
  await page.waitForSelector("[role=dialog]", { state: "detached", timeout: START_MS });
  await page.waitForTimeout(1000);
  return { shown, opened: await page.evaluate(() => window.app.graph._nodes.map((node) => node.type).sort()) };
}

const browser = await chromium.launch({ executablePath: job.chromium, args: FLAGS });
const results = {};
try {
  for (const { name, graph, vue, run: queued } of job.workflows) {
    const page = await browser.newPage({ viewport: { width: 1800, height: 1000 } });
    const said = [];
    page.on("pageerror", (error) => said.push(`page: ${error.message}`));
    page.on("console", (message) => {
      if (message.type() === "error") said.push(`${message.location().url}: ${message.text()}`);
    });
    await openCanvas(page, vue);
    const result = { ...(await load(page, graph)), ...(await look(page, name)) };
    if (queued) {
      result.run = await run(page, { ...job.small, ...(job.files[name] ?? {}) });
      result.after = await look(page, `${name} after`);
    }
    results[name] = { ...result, said };
    await page.close();
  }
  const page = await browser.newPage({ viewport: { width: 1800, height: 1000 } });
  results.templates = await templates(page, job.templates);
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(results));
