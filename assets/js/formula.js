// A formula by KaTeX, which is loaded when the first one is met. Until then, and where KaTeX
// cannot read it, the source is shown.

import { el } from "./dom.js";

let loading = null;

function katex() {
  loading ??= new Promise((resolve, reject) => {
    const here = new URL("../vendor/katex/", import.meta.url);
    document.head.append(el("link", { rel: "stylesheet", href: new URL("katex.min.css", here).href }));
    const script = el("script", { src: new URL("katex.min.js", here).href });
    script.onload = () => resolve(window.katex);
    script.onerror = reject;
    document.head.append(script);
  });
  return loading;
}

export function formula(tex, display, raw, isComplete) {
  const node = el("span", { className: display ? "math display" : "math" }, raw);
  if (isComplete) render(node, tex, display, raw);
  return node;
}

async function render(node, tex, displayMode, raw) {
  try {
    const library = await katex();
    const options = { displayMode, throwOnError: true, trust: false, maxExpand: 200, maxSize: 20,
      strict: false };
    library.render(tex, node, options);
    if (displayMode) node.tabIndex = 0;
  } catch {
    node.textContent = raw;
    node.classList.add("unread");
  }
}
