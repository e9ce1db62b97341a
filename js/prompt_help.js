// Help while a prompt is typed: what is said in it and by which voice, what is wrong with it, how long it is. Shown under
// the inputs of the pack's own prompt nodes, by ComfyUI's documented extension hooks; without it the nodes are the same.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { checkPrompt, excerpt, hasMarks, speechSeconds } from "./prompt_check.js";
import { problemText, textsOf } from "./prompt_texts.js";

const ROUTE = "/nava/prompt_check";
const CHECK = "nava_prompt_check"; // in what a node shows after its run
const SETTING = "NAVA.PromptHelp";
const WAIT_MS = 300; // after the last key, before the server is asked
const MIN_HEIGHT = 36; // two lines; more are scrolled to where the node leaves no room
const MAX_HEIGHT = 160;
const COLOURS = { error: "#ff6b6b", warning: "#f0b429", note: "var(--descrip-text, #999)" };

const setting = (id, otherwise) => app.extensionManager?.setting?.get?.(id) ?? otherwise;
const texts = () => textsOf(setting("Comfy.Locale", "en"));

let serverAnswers = true; // until it says that it knows no such route

async function askServer(question) {
  if (!serverAnswers) return null;
  try {
    const answer = await api.fetchApi(ROUTE, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(question),
    });
    if (answer.status === 404 || answer.status === 405) serverAnswers = false;
    return answer.ok ? await answer.json() : null;
  } catch {
    return null; // the server is away: what was worked out here stays
  }
}

// ------------------------------------------------------------ the node's own inputs

const own = (node, name) => node.widgets?.find((widget) => widget.name === name);
const value = (node, name) => own(node, name)?.value ?? "";
const isLinked = (node, name) => node.inputs?.some((input) => input.name === name && input.link != null) ?? false;
const linkedOf = (node, group) =>
  node.inputs?.filter((input) => input.name.startsWith(`${group}.`) && input.link != null).length ?? 0;

// ------------------------------------------------------------ drawing

function line(text, style = {}, title = "") {
  const element = document.createElement("div");
  element.textContent = text;
  element.title = title;
  Object.assign(element.style, style);
  return element;
}

function speechOf(check, words) {
  if (check.speech_seconds) return check.plain ? words.speechAlone(check) : words.speech(check);
  return check.plain || check.problems.length ? "" : words.silent;
}

function meter(check, words) {
  const share = Math.min(1, check.tokens / check.max_tokens);
  const bar = document.createElement("div");
  Object.assign(bar.style, { height: "3px", background: "#8884", borderRadius: "2px", margin: "1px 0 3px" });
  const full = document.createElement("div");
  Object.assign(full.style, {
    width: `${100 * share}%`,
    height: "100%",
    borderRadius: "2px",
    background: check.tokens > check.max_tokens ? COLOURS.error : share > 0.9 ? COLOURS.warning : "#5a9e6f",
  });
  bar.append(full);
  const said = [`${words.meter(check)} (${words.how(check)})`, speechOf(check, words)].filter(Boolean).join(" · ");
  const assumed = check.clip_assumed && !check.plain && check.speech_seconds > 0;
  const tips = [words.meterTip(check), assumed ? words.assumedTip : ""];
  const text = line(said, {}, tips.filter(Boolean).join("\n"));
  text.dataset.nava = "meter";
  Object.assign(text.dataset, { tokens: check.tokens, exact: check.exact });
  return [text, bar];
}

function problemLine(problem, words) {
  const element = line(problemText(words, problem), { color: COLOURS[problem.severity] });
  Object.assign(element.dataset, { nava: "problem", code: problem.code });
  return element;
}

// The voice comes before the words, which may be cut off by the node's edge.
function spanLine(span, voice, words) {
  const style = { overflow: "hidden", textOverflow: "ellipsis", whiteSpace: "nowrap" };
  if (span.fate === "lost") style.color = COLOURS.error;
  const element = line(words.span(span, voice), style, `${voice}: ${span.words}`);
  Object.assign(element.dataset, { nava: "span", voice: span.voice ?? "" });
  return element;
}

function draw(root, { check, note, voiceOf }) {
  const words = texts();
  const lines = note ? [line(note, { color: COLOURS.note })] : [];
  if (check) {
    lines.push(...meter(check, words));
    lines.push(...check.problems.map((problem) => problemLine(problem, words)));
    lines.push(...check.spans.map((span) => spanLine(span, voiceOf?.(span, words) ?? words.voice(span), words)));
  }
  root.replaceChildren(...lines);
  root.style.minHeight = lines.length ? `${MIN_HEIGHT}px` : "0";
}

// ------------------------------------------------------------ what each node has to say

const withExcerpts = (check, prompt) => {
  const letters = Array.from(prompt);
  for (const problem of check.problems)
    if (problem.position != null) problem.excerpt = excerpt(letters.slice(problem.position).join(""));
  return check;
};

function marksIn(node, names) {
  return names
    .filter((name) => hasMarks(value(node, name)))
    .map((name) => ({ code: "marks", severity: "error", part: own(node, name)?.label ?? name, values: {} }));
}

const KINDS = {
  NavaEncodePrompt: {
    typed: ["prompt", "seconds"],
    ask(node) {
      if (isLinked(node, "prompt")) return null;
      const seconds = isLinked(node, "seconds") ? 0 : Number(value(node, "seconds")) || 0;
      return { prompt: value(node, "prompt"), voices: linkedOf(node, "voices"), seconds };
    },
    resting: (words) => words.linked,
    voiceOf(node) {
      return isLinked(node, "spans") ? (_, words) => words.spanVoices : undefined;
    },
  },
  NavaStructuredPrompt: {
    typed: ["visual", "dynamics", "camera", "audio"],
    ask(node) {
      return { prompt: this.typed.map((name) => value(node, name)).filter(Boolean).join(" ") };
    },
    note: (node, words) => words.structured(linkedOf(node, "spans")),
    problems(node) {
      return marksIn(node, this.typed);
    },
  },
  NavaSpeechSpan: {
    typed: ["words", "speaker", "voice", "emotion", "pace", "position"],
    ask: (node) => ({ prompt: value(node, "words") }),
    problems(node) {
      return marksIn(node, this.typed);
    },
    speech: (node) => speechSeconds(value(node, "words")),
  },
};

// A check of plain text in which speech marks have no meaning.
function plain(kind, node, check) {
  const problems = [...kind.problems(node), ...check.problems.filter(({ code }) => code === "too_long")];
  return { ...check, plain: true, spans: [], problems, speech_seconds: kind.speech?.(node) ?? 0 };
}

class Help {
  constructor(node, kind, root) {
    Object.assign(this, { node, kind, root, asked: 0, timer: null });
  }

  // At once what is known here, a moment later what the server says.
  refresh() {
    const question = this.kind.ask(this.node);
    this.asked += 1;
    clearTimeout(this.timer);
    if (question === null) {
      draw(this.root, { note: this.kind.resting(texts()) });
      return;
    }
    if (!question.prompt.trim() && !question.voices) {
      draw(this.root, {}); // nothing written, nothing to say: a negative's node stays as it is
      return;
    }
    this.show(checkPrompt(question.prompt, question));
    const number = this.asked;
    this.timer = setTimeout(async () => {
      const check = await askServer(question);
      if (check && number === this.asked) this.show(withExcerpts(check, question.prompt));
    }, WAIT_MS);
  }

  show(check) {
    const shown = this.kind.problems ? plain(this.kind, this.node, check) : check;
    const note = this.kind.note?.(this.node, texts());
    draw(this.root, { check: shown, note, voiceOf: this.kind.voiceOf?.(this.node) });
  }

  // Of a prompt that came over a link only the run knows what it holds.
  afterRun(message) {
    const said = message?.[CHECK]?.[0];
    if (typeof said !== "string" || (this.kind.ask(this.node) !== null && !this.kind.note)) return;
    clearTimeout(this.timer);
    this.asked += 1;
    draw(this.root, { check: JSON.parse(said), note: texts().after });
  }
}

// ------------------------------------------------------------ hooks

// Calls `then` after the node's own method of that name.
function after(target, method, then) {
  const before = target[method];
  target[method] = function (...given) {
    const result = before?.apply(this, given);
    then(...given);
    return result;
  };
}

function makeRoot() {
  const root = document.createElement("div");
  root.dataset.nava = "help";
  root.setAttribute("role", "status");
  Object.assign(root.style, {
    font: "11px/1.35 sans-serif",
    color: "var(--input-text, #ccc)",
    overflow: "auto",
    padding: "2px 6px",
    boxSizing: "border-box",
    contain: "size", // what it says takes no room that the node does not have
    height: "100%",
    maxHeight: `${MAX_HEIGHT}px`,
    textAlign: "left",
  });
  return root;
}

const helps = new WeakMap();
let made = 0;

function addHelp(node) {
  const kind = KINDS[node.comfyClass];
  if (!kind || !node.addDOMWidget || setting(SETTING, true) === false) return;
  const root = makeRoot();
  made += 1; // a name of its own: by the name, a redrawn canvas would show another node's help again
  const widget = node.addDOMWidget(`nava_help_${made}`, "nava_help", root, {
    serialize: false,
    getMinHeight: () => (root.childElementCount ? MIN_HEIGHT : 0),
    getMaxHeight: () => (root.childElementCount ? MAX_HEIGHT : 0),
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // it has no place among the values that a workflow keeps
  const help = new Help(node, kind, root);
  helps.set(node, help);
  const refresh = () => help.refresh();
  for (const name of kind.typed) if (own(node, name)) after(own(node, name), "callback", refresh);
  after(node, "onConnectionsChange", () => setTimeout(refresh));
  after(node, "onExecuted", (message) => help.afterRun(message));
  after(node, "onConfigure", refresh);
  after(node, "onRemoved", () => clearTimeout(help.timer));
  refresh();
}

app.registerExtension({
  name: "NAVA.PromptHelp",
  settings: [
    {
      id: SETTING,
      category: ["NAVA", "NAVA", "PromptHelp"],
      name: "Help under prompts",
      tooltip: "Spans, errors, tokens and seconds of speech under the prompts of NAVA nodes added from now on.",
      type: "boolean",
      defaultValue: true,
    },
  ],
  nodeCreated(node) {
    try {
      addHelp(node);
    } catch (error) {
      console.warn("NAVA: no help under this prompt:", error);
    }
  },
  loadedGraphNode: (node) => helps.get(node)?.refresh(),
});
