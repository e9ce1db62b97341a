// What the help under a prompt says, in English and Chinese.

const one = (n) => Number(n).toFixed(1);

const EN = {
  meter: (c) => `${c.exact ? "" : "about "}${c.tokens} of ${c.max_tokens} tokens`,
  how: (c) => (c.exact ? "exact" : "estimated"),
  meterTip: (c) =>
    c.exact
      ? "Counted with the text encoder's own tokenizer."
      : "Estimated: there is no umt5 file in models/text_encoders to count with.",
  speech: (c) => `speech about ${one(c.speech_seconds)} s of ${c.clip_seconds} s${c.clip_assumed ? " (assumed)" : ""}`,
  speechAlone: (c) => `speech about ${one(c.speech_seconds)} s`,
  assumedTip: "Set seconds on this node to your clip's length; 6 s is assumed.",
  silent: "nobody speaks",
  span: (s, voice) => `${s.number} · ${voice} · ${one(s.seconds)} s · “${s.words}”`,
  voice: (s) => (s.voice ? `voice ${s.voice}` : "no voice given"),
  spanVoices: "voice of its span",
  linked: "The prompt comes from another node: what it holds is shown here after a run.",
  after: "Of the last run:",
  structured: (n) => (n ? `${n} speech spans connected.` : "No speech span connected."),
  problems: {
    unclosed: (p) => `The speech that begins “${p.excerpt}” is never closed: write <E> after its words.`,
    nested: (p) => `“${p.excerpt}” opens speech inside speech: close the one before it with <E>.`,
    unopened: (p) => `“${p.excerpt}” closes speech that was never opened: write <S> before its words.`,
    empty: () => "Speech without words: write what is said between <S> and <E>, or remove both.",
    reserved: (p) => `“${p.excerpt}” is a reserved token: write only <S>words<E>.`,
    misspelt: (p) => `“${p.excerpt}” marks no speech: write <S>words<E>, in capitals and plain signs.`,
    no_span: (p) => `${p.values.voices} voices, but nothing is said: write the words as <S>words<E>.`,
    too_many_voices: (p) => `Too many voices: ${p.values.voices} for ${p.values.spans} spans of speech.`,
    too_few_voices: (p) => `${p.values.voices} voices for ${p.values.spans} spans: give one for all, or one for each.`,
    too_long: (p) => `${p.values.tokens} tokens, of which ${p.values.most} fit: the end will be cut.`,
    span_lost: (p) => `Speech ${p.values.span} lies beyond the last token that fits: it won't be spoken.`,
    span_part: (p) => `Speech ${p.values.span} loses its end: it lies beyond the last token that fits.`,
    too_much_speech: (p) =>
      `Too much speech for ${p.values.clip} s: about ${one(p.values.speech)} s, ${one(p.values.least)} s in a hurry.`,
    hurried_speech: (p) =>
      `About ${one(p.values.speech)} s of speech at an easy pace: in ${p.values.clip} s it will be hurried.`,
    marks: (p) => `${p.part}: write plain words, without <S> and <E>; they are put in by themselves.`,
  },
};

const ZH = {
  meter: (c) => `${c.exact ? "" : "约 "}${c.tokens} / ${c.max_tokens} 个 token`,
  how: (c) => (c.exact ? "精确" : "估计"),
  meterTip: (c) =>
    c.exact ? "用文本编码器自己的分词器计数。" : "估计值：models/text_encoders 里没有可用来计数的 umt5 文件。",
  speech: (c) => `语音约 ${one(c.speech_seconds)} 秒，片段 ${c.clip_seconds} 秒${c.clip_assumed ? "（假定）" : ""}`,
  speechAlone: (c) => `语音约 ${one(c.speech_seconds)} 秒`,
  assumedTip: "请把本节点的“秒数”设为片段长度；目前假定为 6 秒。",
  silent: "无人说话",
  span: (s, voice) => `${s.number} · ${voice} · ${one(s.seconds)} 秒 · “${s.words}”`,
  voice: (s) => (s.voice ? `声音 ${s.voice}` : "未给声音"),
  spanVoices: "片段自带的声音",
  linked: "提示词来自另一个节点：运行后在这里显示它的内容。",
  after: "上次运行：",
  structured: (n) => (n ? `已连接 ${n} 个语音片段。` : "没有连接语音片段。"),
  problems: {
    unclosed: (p) => `从“${p.excerpt}”开始的语音没有结束：请在台词后写 <E>。`,
    nested: (p) => `“${p.excerpt}”在另一段语音之内：请先用 <E> 结束前一段。`,
    unopened: (p) => `“${p.excerpt}”结束了一段没有开始的语音：请在台词前写 <S>。`,
    empty: () => "有一段语音没有台词：请在 <S> 和 <E> 之间写出要说的话，或把两者都删掉。",
    reserved: (p) => `“${p.excerpt}”是保留的 token：只写 <S>台词<E>。`,
    misspelt: (p) => `“${p.excerpt}”不是语音标记：请用大写字母和半角符号写 <S>台词<E>。`,
    no_span: (p) => `给了 ${p.values.voices} 个声音，却没有要说的话：请写成 <S>台词<E>。`,
    too_many_voices: (p) => `声音太多：${p.values.voices} 个声音，只有 ${p.values.spans} 段语音。`,
    too_few_voices: (p) => `${p.values.voices} 个声音对 ${p.values.spans} 段语音：请给一个声音说全部，或每段一个。`,
    too_long: (p) => `${p.values.tokens} 个 token，只能容纳 ${p.values.most} 个：末尾会被截断。`,
    span_lost: (p) => `第 ${p.values.span} 段语音超出了能容纳的范围，不会被说出。`,
    span_part: (p) => `第 ${p.values.span} 段语音的结尾超出了能容纳的范围。`,
    too_much_speech: (p) =>
      `${p.values.clip} 秒内话太多：约需 ${one(p.values.speech)} 秒，说得急也要 ${one(p.values.least)} 秒。`,
    hurried_speech: (p) => `从容地说约需 ${one(p.values.speech)} 秒：在 ${p.values.clip} 秒里会说得很急。`,
    marks: (p) => `${p.part}：只写普通文字，不要写 <S> 和 <E>，它们会自动加上。`,
  },
};

export const textsOf = (locale) => (String(locale ?? "").startsWith("zh") ? ZH : EN);

// A problem in words: ours by its code, else the sentence that came with it.
export const problemText = (texts, problem) => texts.problems[problem.code]?.(problem) ?? problem.message ?? problem.code;
