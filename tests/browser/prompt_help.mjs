// Writes prompts in ComfyUI's real canvas as a person does, drops the pack's blueprints and runs them, and says what was
// seen, as JSON on standard output.
//
//     node prompt_help.mjs JOB.json
//
// JOB: {playwright, chromium, url, drawings: {"canvas" or "elements": names of blueprints}, help: whether it is there,
//       prompts: {name: text}, blueprints: {name: {widgets: {name: value}, sockets: {input: [node class, widget,
//       value]}, small: {node class: {widget: value}}}}, pictures}.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";

const job = JSON.parse(readFileSync(process.argv[2], "utf8"));
const { chromium } = createRequire(import.meta.url)(job.playwright);
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"];
const START_MS = 120_000;
const RUN_MS = 120_000;
const SETTLE_MS = 500;
const HELP_MS = job.help ? 10_000 : 0;

async function open(page, vue) {
  await page.goto(job.url);
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.NavaSampler, null, {
    timeout: START_MS,
  });
  await page.evaluate((on) => window.app.ui.settings.setSettingValueAsync("Comfy.VueNodes.Enabled", on), vue);
  await page.waitForTimeout(1000); // the page's own default graph comes a moment later
  await page.evaluate(() => window.app.graph.clear());
}

// Adds nodes of these classes side by side; their ids by class.
function addNodes(page, classes) {
  return page.evaluate((given) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [0, 0];
    return given.map(([type, x, y, width, height], i) => {
      const node = LiteGraph.createNode(type);
      node.pos = [x, y];
      app.graph.add(node);
      if (width) node.setSize([width, Math.max(height, node.computeSize()[1])]);
      return node.id;
    });
  }, classes);
}

const help = (page) => page.locator("[data-nava=help]");

// The help as a person reads it.
const said = (page, n = 0) =>
  page.evaluate((index) => {
    const roots = [...document.querySelectorAll("[data-nava=help]")].filter((each) => each.checkVisibility());
    const root = roots[index]; // those of nodes inside a subgraph are kept out of sight
    const of = (kind) => [...root.querySelectorAll(`[data-nava=${kind}]`)];
    return (
      root && {
        text: root.innerText,
        problems: of("problem").map((each) => [each.dataset.code, each.textContent]),
        spans: of("span").map((each) => each.textContent),
        voices: of("span").map((each) => each.dataset.voice),
        tokens: Number(of("meter")[0]?.dataset.tokens),
        exact: of("meter")[0]?.dataset.exact,
        seen: root.getBoundingClientRect().height > 20 && root.checkVisibility(),
      }
    );
  }, n);

const until = async (page, wanted) => {
  const end = Date.now() + HELP_MS;
  while (Date.now() < end && !(await page.evaluate(wanted))) await page.waitForTimeout(100);
};
const EXACT = () => document.querySelector("[data-nava=meter]")?.dataset.exact === "true";

async function write(page, text, n = 0) {
  const box = page.locator("textarea:visible").nth(n);
  await box.fill("");
  await box.pressSequentially(text.slice(-12), { delay: 1 });
  await box.fill(text);
  await page.waitForTimeout(150);
}

async function prompts(page, picture) {
  const seen = {};
  await addNodes(page, [["NavaEncodePrompt", 420, 120, 460, 380]]);
  await page.waitForTimeout(SETTLE_MS);
  for (const [name, text] of Object.entries(job.prompts)) {
    await write(page, text);
    const atOnce = job.help && (await said(page));
    await page.waitForTimeout(job.help ? 400 : 0);
    await until(page, EXACT);
    seen[name] = { atOnce, later: job.help && (await said(page)) };
    seen[name].value = await page.evaluate(() => {
      const node = window.app.graph._nodes[0];
      return window.app.graphToPrompt().then(({ output, workflow }) => ({
        sent: output[node.id].inputs,
        kept: workflow.nodes[0].widgets_values,
      }));
    });
    await picture(`prompt ${name}`);
  }
  return seen;
}

// Connects voices one after another to what is written; the voice inputs there are after each.
async function voices(page, picture) {
  const before = await page.evaluate(() => window.app.graph._nodes[0].inputs.map(({ name }) => name));
  const seen = [before.filter((name) => name.startsWith("voices.")).length];
  for (let i = 0; i < 3; i += 1) {
    seen.push(
      await page.evaluate((number) => {
        const { app, LiteGraph } = window;
        const [node] = app.graph._nodes;
        const timbre = LiteGraph.createNode("NavaEncodeTimbre");
        timbre.pos = [20, 120 + 180 * number];
        app.graph.add(timbre);
        timbre.connect(0, node, node.inputs.findIndex(({ name }) => name === `voices.voice${number}`));
        return new Promise((done) =>
          setTimeout(() => done(node.inputs.filter(({ name }) => name.startsWith("voices.")).length), 300),
        );
      }, i),
    );
  }
  await page.waitForTimeout(SETTLE_MS);
  await until(page, EXACT);
  await picture("voices");
  return { grown: seen, help: job.help && (await said(page)) };
}

async function fields(page, picture) {
  await addNodes(page, [
    ["NavaSpeechSpan", 60, 100, 420, 420],
    ["NavaStructuredPrompt", 560, 100, 460, 640],
  ]);
  await page.waitForTimeout(SETTLE_MS);
  await write(page, "Good morning, <S>all of you", 0);
  const wrong = await said(page, 0);
  await write(page, "Good morning, all of you", 0);
  await write(page, "A woman at a window <S>", 1);
  await page.waitForTimeout(SETTLE_MS);
  await picture("fields");
  return { wrong, right: await said(page, 0), structured: await said(page, 1) };
}

// What is said of an unclosed span where the canvas speaks Chinese.
async function chinese(page) {
  const speak = (locale) =>
    page.evaluate((given) => window.app.ui.settings.setSettingValueAsync("Comfy.Locale", given), locale);
  await speak("zh");
  await page.waitForTimeout(1500); // the canvas loads its graph anew
  await addNodes(page, [["NavaEncodePrompt", 420, 120, 460, 380]]);
  await page.waitForTimeout(SETTLE_MS);
  await write(page, job.prompts.unclosed);
  const help = await said(page);
  await speak("en");
  return help?.text;
}

// Finds a blueprint as a person does, by its name in the search, and drops it on the empty canvas.
async function drop(page, name) {
  await page.evaluate(() => window.app.graph.clear());
  await page.waitForTimeout(SETTLE_MS);
  const search = page.locator("[role=dialog] input, .comfy-vue-node-search-container input").first();
  for (let tries = 0; tries < 5 && !(await search.isVisible()); tries += 1) {
    await page.mouse.click(1050, 500); // leaves the field that was written in
    await page.waitForTimeout(SETTLE_MS);
    await page.mouse.dblclick(900, 300);
    await page.waitForTimeout(SETTLE_MS);
  }
  await search.fill(name);
  await page.waitForTimeout(900);
  await page.keyboard.press("Enter");
  await page.waitForTimeout(700);
  await page.mouse.click(500, 200); // newer canvases hold the node until it is put down
  await page.waitForFunction(() => window.app.graph._nodes.length === 1, null, { timeout: 20_000 });
  await page.keyboard.press("Escape");
}

async function blueprint(page, name, { widgets, sockets, small }, picture) {
  await drop(page, name);
  await page.waitForTimeout(SETTLE_MS);
  const shown = await page.evaluate(
    async ([values, given, inner]) => {
      const { app, LiteGraph } = window;
      const [node] = app.graph._nodes;
      const names = node.widgets.map((widget) => widget.name);
      const start = Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
      for (const [key, value] of Object.entries(values)) node.widgets.find((one) => one.name === key).value = value;
      for (const each of node.subgraph._nodes)
        for (const [key, value] of Object.entries(inner[each.type] ?? {}))
          each.widgets.find((one) => one.name === key).value = value;
      let y = 60;
      for (const [input, [type, key, value]] of Object.entries(given)) {
        const source = LiteGraph.createNode(type);
        source.pos = [node.pos[0] - 420, node.pos[1] + (y += 320) - 380];
        app.graph.add(source);
        source.widgets.find((one) => one.name === key).value = value;
        source.connect(0, node, node.inputs.findIndex((one) => one.name === input));
      }
      const missing = node.subgraph._nodes.filter((one) => !LiteGraph.registered_node_types[one.type]);
      return { title: node.title, names, start, missing: missing.map(({ type }) => type), count: app.graph._nodes.length };
    },
    [widgets, sockets, small],
  );
  await page.evaluate(() => {
    const [node] = window.app.graph._nodes;
    Object.assign(window.app.canvas.ds, { scale: 0.9, offset: [520 - node.pos[0], 60 - node.pos[1]] });
    window.app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(SETTLE_MS);
  await picture(name);
  return { shown, run: await run(page) };
}

async function run(page) {
  const before = await page.evaluate(async () => Object.keys(await (await fetch("/history")).json()));
  await page.evaluate(() => window.app.queuePrompt(0, 1));
  for (const end = Date.now() + RUN_MS; Date.now() < end; await page.waitForTimeout(300)) {
    const done = await page.evaluate(async (known) => {
      const history = await (await fetch("/history")).json();
      const id = Object.keys(history).find((one) => !known.includes(one) && history[one].status?.status_str);
      return id && { status: history[id].status, outputs: history[id].outputs };
    }, before);
    if (done) return done;
  }
  return { status: { status_str: "nothing ran" }, outputs: {} };
}

const browser = await chromium.launch({ executablePath: job.chromium, args: FLAGS });
const results = {};
try {
  for (const [name, titles] of Object.entries(job.drawings)) {
    const page = await browser.newPage({ viewport: { width: 1500, height: 900 } });
    const errors = [];
    page.on("pageerror", (error) => errors.push(`page: ${error.message}`));
    page.on("console", (message) => {
      if (message.type() === "error" || (message.type() === "warning" && /nava/i.test(message.text())))
        errors.push(`${message.location().url}: ${message.text()}`);
    });
    const picture = async (what) =>
      job.pictures && (await page.screenshot({ path: join(job.pictures, `${name} ${what}.png`) }));
    await open(page, name === "elements");
    const seen = { errors };
    seen.prompts = await prompts(page, picture);
    seen.helps = await help(page).count();
    seen.voices = await voices(page, picture);
    if (job.help) seen.fields = await fields(page, picture);
    seen.blueprints = {};
    for (const title of titles) seen.blueprints[title] = await blueprint(page, title, job.blueprints[title], picture);
    if (job.help) seen.chinese = await chinese(page);
    results[name] = seen;
    await page.close();
  }
} finally {
  await browser.close();
}
process.stdout.write(JSON.stringify(results));
