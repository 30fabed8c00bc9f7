"use strict";
// Answers that are being written, one at a time.

const ALTERNATIVES = 5; // likeliest tokens to ask for

class Writing {
  constructor(page, api) {
    this.page = page;
    this.api = api;
    this.now = null; // { node, conversation, stop, asked, removed } while an answer is written
    this.failed = null; // { parent, conversation, error }: an answer that did not come
    this.tokens = new Map(); // of the answers since the page was opened, by id
  }

  // Stop the answer; what there is of it stays.
  halt() {
    this.now?.stop.abort();
  }

  // Let the model answer a message, the id of which is `parent`.
  async answer(conversation, model, parent) {
    if (this.now) return;
    const node = conversation.add(parent, "assistant", "");
    Object.assign(conversation, { model: model.id, at: Date.now() });
    this.now = { node, conversation, stop: new AbortController(), asked: performance.now() };
    this.failed = null;
    this.tokens.set(node.id, []);
    this.page.keep(conversation);
    this.page.draw({ toEnd: true });
    this.page.note(say("writing"));
    const { now } = this;
    try {
      await this.read(now, model, await this.input(now, model, parent));
    } catch (error) {
      if (error.name === "AbortError") node.reason = "stopped";
      else this.failed = { parent, conversation, error };
    }
    this.now = null;
    if (!node.text && (this.failed || node.reason === "stopped")) conversation.remove(node);
    if (!now.removed) this.page.keep(conversation);
    this.page.note(this.failed ? "" : say(node.reason === "stopped" ? "stopped" : "done"));
    this.page.draw();
    if (this.failed?.error.word === "wantsKey") this.page.settingsPanel.open("key");
  }

  // Return what is sent: the newest turns of a chat, or a text.
  async input({ conversation, node, stop }, model, parent) {
    const path = conversation.upTo(parent);
    if (conversation.mode === "text") return { model: model.id, prompt: path.map(({ text }) => text).join("") };
    const turns = path.map(({ role, text }) => ({ role, content: text }));
    const most = this.page.settings.numbers.max_tokens ?? model.sampling.max_new_tokens;
    const { messages, gone } = await this.api.fitting(model.id, conversation.system, turns, most, stop.signal);
    if (gone) node.gone = gone;
    return { model: model.id, messages };
  }

  // Read an answer as it comes.
  async read({ node, stop, asked }, model, input) {
    const alternatives = this.page.settings.probabilities ? ALTERNATIVES : 0;
    const tokens = this.tokens.get(node.id);
    node.context = model.max_model_len;
    let n = 0;
    let first;
    for await (const part of this.api.answer(input, this.settings(), alternatives, stop.signal)) {
      node.text += part.text;
      tokens.push(...part.tokens);
      if (part.reason) node.reason = part.reason;
      if (part.text || part.tokens.length) {
        const time = performance.now();
        first ??= time;
        n += part.tokens.length || 1;
        const rate = n > 1 ? (1000 * (n - 1)) / (time - first) : 0;
        Object.assign(node, { n, rate, wait: (first - asked) / 1000 });
      }
      if (part.usage) {
        // the server counts tokens where we may have counted pieces, and knows when it wrote them
        const { completion_tokens: exact, total_tokens: used } = part.usage;
        const seconds = (part.timings.total_ms - part.timings.first_token_ms) / 1000;
        Object.assign(node, { n: exact, used, rate: exact > 1 && seconds > 0 ? (exact - 1) / seconds : 0 });
      }
      this.refresh(node);
    }
  }

  // Draw the answer that is being written, in at most a quarter of the time.
  refresh(node) {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => setTimeout(() => {
      const begun = performance.now();
      if (this.now?.node === node) this.page.redraw(node);
      setTimeout(() => (this.pending = false), 3 * (performance.now() - begun));
    }, 40));
  }

  // Return the settings that a request has; what is left empty is the server's.
  settings() {
    const { numbers, stops } = this.page.settings;
    const stop = stops.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
    return { ...numbers, ...(stop.length ? { stop } : {}) };
  }
}
