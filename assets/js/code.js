// A block of code: its language, a copy button, the exact text (tabs too), colours when complete.

import { copyText, el, showDone } from "./dom.js";
import { t } from "./texts.js";

const LARGEST_COLOURED = 60000;
let loading = null;

const highlighter = () =>
  (loading ??= import("../vendor/highlight.min.js").then((module) => module.default));

export function codeBlock(text, language, isComplete) {
  const code = el("code", {}, text);
  const copy = el("button", { type: "button", className: "small", data: { t: "copy_code" } },
    t("copy_code"));
  copy.addEventListener("click", async () => {
    showDone(copy, t("copied"), await copyText(text));
  });
  const name = el("span", {}, language || "text");
  if (isComplete && language && text.length < LARGEST_COLOURED) colour(code, text, language);
  const pre = el("pre", { tabIndex: 0 }, code);
  return el("div", { className: "code" }, el("div", { className: "code-top" }, name, copy), pre);
}

async function colour(code, text, language) {
  const hljs = await highlighter();
  if (!hljs.getLanguage(language)) return;
  // highlight.js escapes what it is given; it only ever adds spans around it.
  const coloured = hljs.highlight(text, { language, ignoreIllegals: true }).value;
  code.innerHTML = coloured;
  if (code.textContent !== text) code.textContent = text;
}
