// Markdown to DOM, exactly: the parser is marked's, the nodes are made here one by one.
//
// No HTML string is ever given to the browser, so nothing needs cleaning: a tag in an answer is
// shown as the text it is, links go to http, https and mailto only, pictures become links. What
// Markdown would take from a reader of code and sums is kept: __init__, 2*3*4, ~5, doubled spaces,
// tabs. Formulas: $$…$$, \[…\], \(…\), \begin{…}…\end{…}, and $…$ where it cannot be money.

import { el } from "./dom.js";
import { codeBlock } from "./code.js";
import { formula } from "./formula.js";

const BLOCK_MATH = [
  /^ {0,3}\$\$([\s\S]+?)\$\$[ \t]*(?:\n|$)/,
  /^ {0,3}\\\[([\s\S]+?)\\\][ \t]*(?:\n|$)/,
  /^ {0,3}(\\begin\{([a-zA-Z]+\*?)\}[\s\S]+?\\end\{\2\})[ \t]*(?:\n|$)/,
];
const INLINE_MATH = [
  [/^\$\$([^$]+?)\$\$/, true],
  [/^\\\[([\s\S]+?)\\\]/, true],
  [/^\\\(([\s\S]+?)\\\)/, false],
  // One dollar: tight inside, no digit or letter behind, and something in it that only a formula has.
  [/^\$(?![\s$])((?:\\.|[^$\n\\])*?[^\s$\\])\$(?![\w$])/, false],
];
const ONLY_IN_FORMULAS = /[\\^_=+<>{}]|^[A-Za-z]$|^[A-Za-z]\([A-Za-z]\)$/;

const blockMath = {
  name: "blockMath",
  level: "block",
  start: (src) => src.match(/(?:^|\n) {0,3}(?:\$\$|\\\[|\\begin\{)/)?.index,
  tokenizer(src) {
    for (const rule of BLOCK_MATH) {
      const match = rule.exec(src);
      if (match) return { type: "math", raw: match[0], tex: match[1], display: true };
    }
    return undefined;
  },
};

const inlineMath = {
  name: "inlineMath",
  level: "inline",
  start: (src) => src.match(/\$|\\\(|\\\[/)?.index,
  tokenizer(src) {
    for (const [rule, display] of INLINE_MATH) {
      const match = rule.exec(src);
      if (!match) continue;
      if (!display && match[0][0] === "$" && !ONLY_IN_FORMULAS.test(match[1])) continue;
      return { type: "math", raw: match[0], tex: match[1], display };
    }
    return undefined;
  },
};

const literal = (raw) => ({ type: "text", raw, text: raw, escaped: true });

const exact = {
  // __init__ is a name; __two words__ is bold. A star between two ASCII letters or digits is a sign.
  emStrong(src, masked, previous = "") {
    const name = /^__[A-Za-z0-9]\w*?__(?!\w)/.exec(src);
    if (name) return literal(name[0]);
    const stars = /^\*+/.exec(src)?.[0];
    if (stars && /[A-Za-z0-9]$/.test(previous) && /^\*+[A-Za-z0-9]/.test(src)) return literal(stars);
    return false;
  },
  del(src) {
    const match = /^~~(?=\S)([\s\S]*?\S)~~(?!~)/.exec(src);
    if (!match) return src[0] === "~" ? literal(/^~+/.exec(src)[0]) : undefined;
    const tokens = this.lexer.inlineTokens(match[1]);
    return { type: "del", raw: match[0], text: match[1], tokens };
  },
  // Any tag is text, in its place.
  html: () => undefined,
  tag: () => undefined,
};

let marked = null;
let loading = null;
const waiting = new Map(); // what is to be drawn where, once marked is there

export function loadMarkdown() {
  loading ??= import("../vendor/marked.esm.js").then(({ Marked }) => {
    marked = new Marked({ gfm: true, breaks: true, extensions: undefined, tokenizer: exact });
    marked.use({ extensions: [blockMath, inlineMath] });
    for (const [target, [text, isEnded]] of waiting) draw(target, text, isEnded);
    waiting.clear();
  });
  return loading;
}

/** The answer's Markdown as marked's tokens. */
function parse(text) {
  const hidden = hideTabs(text);
  const tokens = marked.lexer(hidden);
  return hidden === text ? tokens : showTabs(tokens);
}

// marked makes spaces of the tabs in a list's items. Those inside a fence and those behind a word
// only stand in the text: they pass marked as a sign that no text has, and come back.
const TAB = "\uf8f9";
const FENCE = /^([\s>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}|~{3,})/;

function hideTabs(text) {
  if (!text.includes("\t") || text.includes(TAB)) return text;
  let fence = null;
  return text.split("\n").map((line) => {
    const found = FENCE.exec(line);
    if (!fence) {
      if (found) fence = { mark: found[2], columns: found[1].replaceAll("\t", "    ").length };
      return line.replace(/([\p{L}\p{N}`"'};,=])(\t+)/gu, (all, sign, tabs) => sign + TAB.repeat(tabs.length));
    }
    if (found?.[2].startsWith(fence.mark) && line.trim() === found[2]) {
      fence = null;
      return line;
    }
    let at = 0; // behind the item's own indentation
    for (let column = 0; column < fence.columns && /[ \t]/.test(line[at] ?? ""); at += 1) {
      column += line[at] === "\t" ? 4 : 1;
    }
    return line.slice(0, at) + line.slice(at).replaceAll("\t", TAB);
  }).join("\n");
}

function showTabs(value) {
  if (typeof value === "string") return value.replaceAll(TAB, "\t");
  if (value && typeof value === "object") {
    for (const key of Object.keys(value)) value[key] = showTabs(value[key]);
  }
  return value;
}

/**
 * Draw `text` into `target`, touching only the blocks that changed since the last call on it, so
 * that the cost of an update does not grow with what is already there.
 */
export function draw(target, text, isEnded = true) {
  if (!marked) {
    waiting.set(target, [text, isEnded]);
    loadMarkdown();
    return;
  }
  const tokens = parse(text).filter((token) => token.type !== "space");
  const before = target.blocks ?? [];
  const keys = tokens.map((token, i) => `${isEnded || i < tokens.length - 1}|${token.raw}`);
  let same = 0;
  while (same < keys.length && keys[same] === before[same]) same += 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  for (let i = same; i < tokens.length; i += 1) {
    target.append(block(tokens[i], isEnded || i < tokens.length - 1));
  }
  target.blocks = keys;
}

function block(token, isComplete = true) {
  switch (token.type) {
    case "heading":
      return el(`h${Math.min(token.depth + 1, 6)}`, {}, ...inline(token.tokens));
    case "paragraph":
      return el("p", {}, ...inline(token.tokens));
    case "code":
      return codeBlock(token.text, (token.lang ?? "").split(/\s/)[0], isComplete);
    case "blockquote":
      return el("blockquote", {}, ...token.tokens.filter(isShown).map((t) => block(t, isComplete)));
    case "list":
      return list(token, isComplete);
    case "table":
      return table(token);
    case "hr":
      return el("hr");
    case "math":
      return el("p", {}, formula(token.tex, true, token.raw.trim(), isComplete));
    case "def":
      return el("p", {}, token.raw.trimEnd());
    case "text":
      return el("p", {}, ...(token.tokens ? inline(token.tokens) : [token.text]));
    default:
      return el("p", {}, token.raw);
  }
}

const isShown = (token) => token.type !== "space";

function list(token, isComplete) {
  const properties = token.ordered ? { start: Number(token.start) || 0 } : {};
  const items = token.items.map((item) => el("li", { className: item.task ? "task" : "" }, ...itemContent(item, isComplete)));
  return el(token.ordered ? "ol" : "ul", properties, ...items);
}

function itemContent(item, isComplete) {
  const nodes = [];
  if (item.task) nodes.push(item.checked ? "☑ " : "☐ ");
  for (const token of item.tokens.filter(isShown)) {
    if (token.type === "checkbox") continue;
    if (token.type === "text" && !item.loose) {
      nodes.push(...(token.tokens ? inline(token.tokens) : [token.text]));
    } else nodes.push(block(token, isComplete));
  }
  return nodes;
}

function table(token) {
  const widths = token.header.map((_, i) => columnWidth([token.header, ...token.rows].map((row) => row[i].text)));
  const cell = (tag) => (content, i) =>
    el(tag, { style: `min-width: ${widths[i]}${token.align[i] ? `; text-align: ${token.align[i]}` : ""}` },
      ...inline(content.tokens, true));
  const head = el("tr", {}, ...token.header.map(cell("th")));
  const rows = token.rows.map((row) => el("tr", {}, ...row.map(cell("td"))));
  const whole = el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows));
  return el("div", { className: "table", tabIndex: 0, role: "group" }, whole);
}

/** Room for the longest of `texts`, or for a few words: a number stays whole, a sentence readable;
 * a table that is too wide for the page scrolls. */
function columnWidth(texts) {
  const lengths = texts.map((words) => [...words].reduce((sum, c) => sum + (c > "\u2e80" ? 2 : 1), 0));
  return `calc(${Math.min(Math.max(...lengths), 12)}ch + 24px)`;
}

function inline(tokens = [], isInTable = false) {
  return tokens.flatMap((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return [el(token.type, {}, ...inline(token.tokens, isInTable))];
      case "codespan":
        return [el("code", {}, token.text)];
      case "br":
        return [el("br")];
      case "math":
        return [formula(token.tex, token.display, token.raw, true)];
      case "link":
        return [link(token.href, inline(token.tokens, isInTable), token.raw)];
      case "image":
        return [link(token.href, [token.text || token.href], token.raw)];
      case "text":
        return token.tokens ? inline(token.tokens, isInTable) : text(token, isInTable);
      case "escape":
        return [token.text];
      default:
        return [token.raw];
    }
  });
}

/** A cell has no other way to break a line than <br>; elsewhere a tag is text. */
function text(token, isInTable) {
  if (!isInTable) return [token.raw];
  return token.raw.split(/<br\s*\/?>/i).flatMap((part, i) => (i ? [el("br"), part] : [part]));
}

function link(address, content, raw) {
  if (!/^(https?:|mailto:)/i.test(address.trim())) return raw;
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" },
    ...content);
}
