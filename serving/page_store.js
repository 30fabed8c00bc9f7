"use strict";
// What the browser keeps: conversations, each under a key of its own, so that two windows do not overwrite each other;
// settings; and, until the tab is closed, the API key.

const KEPT = "little-llama/";
const NUMBERS = { // settings of a request: least, most, step
  max_tokens: [1, 1000000, 1], temperature: [0, 100, 0.05], top_k: [0, 1000000, 1], top_p: [0.01, 1, 0.01],
  min_p: [0, 1, 0.01], repetition_penalty: [0.01, 100, 0.05], frequency_penalty: [-2, 2, 0.1],
  presence_penalty: [-2, 2, 0.1], seed: [0, 9007199254740991, 1],
};

function newId() {
  return `n${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
}

// A conversation is a tree: a message that is edited and an answer that is drawn again stand beside the older ones.
// `picked` says which of them is shown after each message ("": at the beginning).
class Conversation {
  constructor(values = {}) {
    const empty = { id: newId(), title: "", at: Date.now(), mode: "chat", model: "", system: "", nodes: {}, picked: {} };
    Object.assign(this, empty, values);
  }

  // Add a message after another one and show it. role: user or assistant.
  add(parent, role, text) {
    const node = { id: newId(), parent, role, text };
    this.nodes[node.id] = node;
    this.picked[parent] = node.id;
    if (!this.title && role === "user") this.title = text.trim().replace(/\s+/g, " ").slice(0, 60);
    return node;
  }

  remove(node) {
    delete this.nodes[node.id];
    const others = this.versions(node);
    if (others.length) this.picked[node.parent] = others.at(-1).id;
    else delete this.picked[node.parent];
  }

  // Return a message and the others in its place, the oldest first.
  versions(node) {
    return Object.values(this.nodes).filter((other) => other.parent === node.parent);
  }

  // Return the messages that are shown.
  shown() {
    const found = [];
    for (let node = this.nodes[this.picked[""]]; node && !found.includes(node); node = this.nodes[this.picked[node.id]]) {
      found.push(node);
    }
    return found;
  }

  // Return the messages up to and with one.
  upTo(id) {
    const found = [];
    for (let node = this.nodes[id]; node && !found.includes(node); node = this.nodes[node.parent]) found.unshift(node);
    return found;
  }

  // Return the record that fine_tuning.py and /load of eval.py read.
  record() {
    const system = this.system ? [{ role: "system", content: this.system }] : [];
    return { messages: [...system, ...this.shown().map(({ role, text }) => ({ role, content: text }))] };
  }

  // Return a new conversation from a record. Throws where there is none.
  static of(record, title) {
    const made = new Conversation({ title });
    let parent = "";
    if (!Array.isArray(record?.messages)) throw new TypeError("messages");
    for (const { role, content } of record.messages) {
      if (typeof content !== "string") throw new TypeError("content");
      if (role === "system") made.system = content;
      else if (["user", "assistant"].includes(role)) parent = made.add(parent, role, content).id;
      else throw new TypeError(String(role));
    }
    return made;
  }
}

class Store {
  // Return all conversations, the newest first; what cannot be read stays where it is.
  all() {
    const found = [];
    for (const key of Object.keys(localStorage).filter((each) => each.startsWith(`${KEPT}c/`))) {
      try {
        const values = JSON.parse(localStorage.getItem(key));
        if (typeof values.nodes === "object" && typeof values.picked === "object") found.push(new Conversation(values));
      } catch { /* not ours */ }
    }
    return found.sort((a, b) => b.at - a.at);
  }

  // Keep a conversation. Throws where the store is full.
  save(conversation) {
    localStorage.setItem(`${KEPT}c/${conversation.id}`, JSON.stringify(conversation));
  }

  remove(conversation) {
    localStorage.removeItem(`${KEPT}c/${conversation.id}`);
  }

  get settings() {
    const defaults = { numbers: {}, stops: "", language: "", theme: "", probabilities: true, colours: false };
    try {
      return { ...defaults, ...JSON.parse(localStorage.getItem(`${KEPT}settings`)) };
    } catch {
      return defaults;
    }
  }

  set settings(values) {
    localStorage.setItem(`${KEPT}settings`, JSON.stringify(values));
  }

  get key() {
    return sessionStorage.getItem(`${KEPT}key`) ?? "";
  }

  set key(value) {
    sessionStorage.setItem(`${KEPT}key`, value);
  }
}
