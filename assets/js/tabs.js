// What this page's tabs tell each other: whose answer is being written, and how far it is.
//
// A tab that shows an answer it does not write itself asks for it every second; the tab that writes
// answers at once, and tells of each piece while somebody asks. Who is asked and says nothing is
// gone (closed, crashed): there the answer was stopped.

const CHANNEL = "chat-page";
const ASK_EVERY = 1000;
const PATIENCE = 4000; // after the last word of a tab that was heard
const FIRST_PATIENCE = 1500; // a tab that lives answers within milliseconds

export class Tabs {
  constructor(chat) {
    this.chat = chat;
    this.asked = 0; // when another tab last wanted to know of ours
    this.heard = new Map(); // of others' answers: when each was last told of
    this.asking = null;
    try {
      this.channel = new BroadcastChannel(CHANNEL);
      this.channel.onmessage = ({ data }) => this.#take(data);
    } catch {
      this.channel = null; // inside a frame that may not
    }
  }

  /** Tell of this tab's answer: when it begins and ends, and when it is asked for. */
  tell(run, changed = {}) {
    const { conversation, node } = run;
    this.channel?.postMessage({ conversation: conversation.id,
      question: conversation.nodes[node.parent], answer: { ...node, ...changed } });
  }

  /** This tab's answer has grown. */
  grown(run) {
    if (Date.now() - this.asked < PATIENCE) this.tell(run);
  }

  /** Whether another tab said that it writes this answer. */
  isWriting(node) {
    return this.heard.has(node.id);
  }

  /** Ask for what is being written, but not here, as long as it is shown. */
  watch() {
    clearInterval(this.asking);
    const since = Date.now();
    const ask = () => {
      const foreign = this.chat.foreign();
      if (!foreign.length) clearInterval(this.asking);
      for (const node of foreign) this.#ask(node, since);
    };
    this.asking = setInterval(ask, ASK_EVERY);
    ask();
  }

  #ask(node, since) {
    const last = this.heard.get(node.id);
    const silence = Date.now() - (last ?? since);
    if (this.channel && silence < (last ? PATIENCE : FIRST_PATIENCE)) {
      this.channel.postMessage({ ask: node.id });
    } else {
      this.heard.delete(node.id);
      this.chat.giveUp(node);
    }
  }

  #take(told) {
    const { run } = this.chat;
    if (told.ask) {
      if (run?.node.id !== told.ask) return;
      this.asked = Date.now();
      this.tell(run);
      return;
    }
    const { id, state } = told.answer;
    const isNews = !this.heard.has(id);
    if (state === "running") this.heard.set(id, Date.now());
    else this.heard.delete(id);
    this.chat.hear(told);
    if (isNews && state === "running") this.watch();
  }
}
