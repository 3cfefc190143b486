// What stands under an answer besides its words: the queue, what went wrong and what to do, files
// that were not used, the numbers.

import { el } from "./dom.js";
import { duration, has, isChinese, t } from "./texts.js";

/** `offer` is what the reader may do about a conversation that is too long; see context.js. */
export function drawNotes(place, node, isRunning, { isElsewhere, offer }) {
  const parts = [];
  if (isElsewhere) parts.push(el("p", { className: "pulse" }, t("elsewhere")));
  else if (isRunning && !node.text && !node.reasoning) parts.push(queueLine(node));
  for (const note of node.notes ?? []) {
    parts.push(el("details", { className: "note" }, el("summary", {}, t(note.code)),
      el("p", {}, t(`${note.code}_more`, note))));
  }
  if (node.error) parts.push(errorBox(node.error, isRunning ? null : offer));
  if (!isRunning && node.state === "stopped") parts.push(el("p", { className: "quiet" }, t("stopped")));
  if (!isRunning && node.cut) parts.push(el("p", { className: "quiet" }, t("cut")));
  if (node.rewritten) parts.push(el("p", { className: "quiet" }, t("rewritten")));
  const key = parts.map((part) => part.outerHTML).join("");
  if (place.key === key) return;
  place.key = key;
  place.replaceChildren(...parts);
}

/** Before the first word: who is ahead, or that the prompt is being read. */
export function queueLine(node) {
  const { ahead, wait_seconds: wait } = node.queue ?? {};
  let words = t(node.phase ? "phase_reading" : "phase_sending");
  if (node.phase === "waiting") words = t("phase_waiting");
  else if (node.phase === "queued" && ahead > 0) {
    words = t(wait ? "phase_queued_time" : "phase_queued", { ahead, time: duration(wait ?? 0) });
  }
  return el("p", { className: "pulse" }, words);
}

/** The server's own sentence: it names the field and the fix, in English. */
export function serverWords(message) {
  const words = el("p", { className: "quiet" }, message);
  return isChinese() ? el("details", {}, el("summary", {}, t("server_words")), words) : words;
}

/** What happened, and what to do about it. */
function errorBox(error, offer) {
  const code = has(`error_${error.code}`) ? error.code : "server_error";
  const parts = [el("strong", {}, t(`error_${code}`)), el("p", {}, t(`error_${code}_do`))];
  const chance = code === "context_length_exceeded" ? offer?.() : null;
  if (chance) {
    parts.push(el("button", { type: "button", className: "small", on: { click: chance.take } },
      t(chance.count === 1 ? "read_alone" : "read_from", { count: chance.count })));
  }
  if (error.message) parts.push(serverWords(error.message));
  return el("div", { className: "error", role: "group", aria: { label: t("error") } }, ...parts);
}

export function statsLine(node) {
  const stats = node.stats ?? {};
  const parts = [];
  if (stats.tokens_per_second) {
    parts.push(t("stat_rate", { rate: number(stats.tokens_per_second) }));
  }
  if (stats.completion_tokens) parts.push(t("stat_tokens", { count: stats.completion_tokens }));
  if (stats.first_token_seconds) {
    parts.push(t("stat_first", { seconds: number(stats.first_token_seconds) }));
  }
  return parts.join(" · ");
}

const number = (value) => (value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(2));
