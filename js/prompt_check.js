// What can be said of a prompt at once, without the server: the same rules and rates as nava_core/prompt/check.py,
// spans.py and speech_time.py, which give the full check a moment later. Plain functions: nothing here needs a page.

export const MAX_TOKENS = 512;
export const USUAL_CLIP_SECONDS = 6;
export const WORDS_A_SECOND = 2.5;
export const CHARACTERS_A_SECOND = 25 / 6;
export const HURRY = 1.4;
export const TOKENS_A_WORD = 1.35;
export const TOKENS_A_CHARACTER = 0.75;
export const TOKENS_A_SIGN = 1;
export const TOKENS_A_SPAN = 7;
export const MAX_FAULTS = 20;

const CJK = "\\u3040-\\u30ff\\u3400-\\u4dbf\\u4e00-\\u9fff\\uac00-\\ud7af";
const MARKS = /<S>|<E>|<\/S>|<extra_id_\d+>/g;
const LIKE_MARKS = /(?!<S>|<E>|<\/S>)[<＜] ?[/／]?[sSeEｓＳｅＥ] ?[>＞]/;
const SPAN_MARKS = /<S>|<E>|<\/S>/g;
const SYLLABLES = new RegExp(`[${CJK}0-9]`, "gu");
const SPOKEN_WORDS = new RegExp(
  `(?:(?![${CJK}])[\\p{L}\\p{Nl}\\p{No}])+(?:['’-][\\p{L}\\p{Nl}\\p{No}]+)*`,
  "gu",
);
const HAN = new RegExp(`[${CJK}]`, "gu");
const WORDS = new RegExp(`(?:(?![${CJK}])[\\p{L}\\p{N}])+`, "gu");
const SIGNS = /[^\p{L}\p{N}\s]/gu;
const EXCERPT = 24;

const count = (text, pattern) => (text.match(pattern) ?? []).length;

export function excerpt(text) {
  return [...text.slice(0, 2 * EXCERPT)].slice(0, EXCERPT).join("").split(/\s+/).filter(Boolean).join(" ");
}

export function hasMarks(text) {
  return count(text.normalize("NFKC"), MARKS) > 0;
}

export function speechSeconds(words) {
  return count(words, SPOKEN_WORDS) / WORDS_A_SECOND + count(words, SYLLABLES) / CHARACTERS_A_SECOND;
}

export function estimateTokens(prompt) {
  if (!prompt.trim()) return 0;
  const text = prompt.replace(SPAN_MARKS, " ");
  return (
    1 +
    Math.floor(
      0.5 +
        count(text, WORDS) * TOKENS_A_WORD +
        count(text, HAN) * TOKENS_A_CHARACTER +
        count(text, SIGNS) * TOKENS_A_SIGN +
        (count(prompt, SPAN_MARKS) * TOKENS_A_SPAN) / 2,
    )
  );
}

// The whole spans, and what is wrong with the rest.
export function scanSpans(prompt) {
  const spans = [];
  const problems = [];
  const fault = (code, at) => problems.push({ code, severity: "error", excerpt: excerpt(prompt.slice(at)), values: {} });
  let opened = null;
  for (const { 0: mark, index } of prompt.matchAll(MARKS)) {
    if (mark === "<S>") {
      if (opened !== null) fault("nested", index);
      opened = index;
    } else if (mark !== "<E>" && mark !== "</S>") {
      fault("reserved", index);
    } else if (opened === null) {
      fault("unopened", index);
    } else {
      const words = prompt.slice(opened + "<S>".length, index).trim();
      if (words) spans.push({ number: spans.length + 1, words, seconds: speechSeconds(words), voice: null, fate: "" });
      else fault("empty", opened);
      opened = null;
    }
  }
  if (opened !== null) fault("unclosed", opened);
  return { spans, problems };
}

// What voices and spans do not fit, and else each span's voice.
function bind(spans, voices, problems) {
  if (!voices) return;
  const values = { voices, spans: spans.length };
  const fault = (code) => problems.push({ code, severity: "error", values });
  if (!spans.length) fault("no_span");
  else if (voices > spans.length) fault("too_many_voices");
  else if (voices > 1 && voices < spans.length) fault("too_few_voices");
  else spans.forEach((span, i) => (span.voice = voices === 1 ? 1 : i + 1));
}

// The first mark in small letters or full-width signs: it marks no speech.
function misspelt(prompt) {
  const found = LIKE_MARKS.exec(prompt);
  return found ? [{ code: "misspelt", severity: "warning", excerpt: found[0], values: {} }] : [];
}

function speechProblems(speech, clip) {
  const values = { speech, least: speech / HURRY, clip };
  if (values.least > clip) return [{ code: "too_much_speech", severity: "warning", values }];
  return speech > clip ? [{ code: "hurried_speech", severity: "note", values }] : [];
}

// The same as the server's answer, its tokens estimated and what is cut not known.
export function checkPrompt(prompt, { voices = 0, seconds = 0 } = {}) {
  const { spans, problems: faults } = scanSpans(prompt);
  const problems = [...faults.slice(0, MAX_FAULTS), ...misspelt(prompt)];
  if (!faults.length) bind(spans, voices, problems);
  const tokens = estimateTokens(prompt);
  if (tokens > MAX_TOKENS)
    problems.push({ code: "too_long", severity: "warning", values: { tokens, most: MAX_TOKENS } });
  const speech = speechSeconds(spans.map((span) => span.words).join(" "));
  const clip = seconds || USUAL_CLIP_SECONDS;
  problems.push(...speechProblems(speech, clip));
  return {
    spans,
    problems,
    tokens,
    max_tokens: MAX_TOKENS,
    exact: false,
    speech_seconds: speech,
    clip_seconds: clip,
    clip_assumed: !seconds,
  };
}
