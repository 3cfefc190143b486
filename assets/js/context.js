// How much of the model's context the conversation takes, and what to do when it no longer fits:
// the server refuses it, and the reader may have the model read from a later message on.

import { byId, el } from "./dom.js";
import { t } from "./texts.js";

const ROOM = 0.6; // of the context for what is read: an estimate may be off, the answer needs some
const PICTURE = 600; // tokens, about
const short = (n) => (n < 1000 ? String(n) : `${(n / 1000).toFixed(n < 10000 ? 1 : 0)}k`);

/** The ring: tokens that the conversation took when it was last answered. */
export function drawContext(chat, size) {
  const place = byId("context");
  const last = chat.path().filter((node) => node.stats?.prompt_tokens).at(-1);
  place.hidden = !size || !last;
  if (place.hidden) return;
  const used = last.stats.prompt_tokens + (last.stats.completion_tokens ?? 0);
  const share = Math.min(1, used / size);
  place.style.setProperty("--share", `${share * 360}deg`);
  place.classList.toggle("full", share > 0.8);
  place.replaceChildren(el("span", { className: "ring", aria: { hidden: "true" } }),
    el("span", { className: "name" }, t("context_name")), t("context", { used: short(used), size: short(size) }));
  place.title = t(share > 0.8 ? "context_full" : "context_hint");
}

/**
 * What may be offered under an answer that failed because the conversation is too long: {count,
 * take}, where `count` is how many messages, the question among them, would still be read. Null
 * when the question alone is too long.
 */
export function offerToCut(chat, answer) {
  const size = chat.settings.contextLength;
  const path = chat.path(chat.conversation, answer.parent);
  const begin = Math.max(0, path.indexOf(chat.first(path)));
  const scale = measured(path, begin);
  let room = ROOM * size;
  let at = path.length;
  while (at > begin && (room -= scale * tokens(path[at - 1])) >= 0) at -= 1;
  // The estimate says that all fits, the server that it does not: half of it, then.
  if (at === begin) at = Math.ceil((begin + path.length) / 2);
  while (at < path.length && path[at].role !== "user") at += 1;
  if (!size || at >= path.length || at <= begin) return null;
  return { count: path.length - at, take: () => chat.readFrom(path[at], answer) };
}

/** Real tokens for one estimated token, by the last answer on `path`. */
function measured(path, begin) {
  const at = path.findLastIndex((node) => node.stats?.prompt_tokens);
  const estimated = path.slice(begin, Math.max(at, begin)).reduce((sum, node) => sum + tokens(node), 0);
  return estimated > 200 ? path[at].stats.prompt_tokens / estimated : 1;
}

/** About: a token for each Chinese character, for four letters, and a few around the message. */
function tokens(node) {
  const files = node.files ?? [];
  const all = [node.text, ...files.map((file) => file.text ?? "")].join("");
  const wide = all.match(/[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]/g)?.length ?? 0;
  const pictures = files.filter((file) => file.kind === "image").length;
  return 8 + wide + (all.length - wide) / 4 + PICTURE * pictures;
}
