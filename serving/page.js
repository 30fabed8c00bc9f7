"use strict";
// The page: which conversation is shown, and what its buttons do.

const $ = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.store = new Store();
    this.settings = this.store.settings;
    this.api = new Api(this.store);
    this.models = []; // what /v1/models says
    this.conversation = this.store.all()[0] ?? new Conversation();
    this.writing = new Writing(this, this.api);
    this.messages = new Messages(this, this.writing);
    this.tip = new Tip($("tip"), this.writing);
    this.settingsPanel = new SettingsPanel(this);
  }

  get model() {
    return this.models.find((card) => card.id === $("model").value) ?? this.models[0];
  }

  note(text) {
    $("note").textContent = text;
  }

  // Ask the server which models it has.
  async connect() {
    try {
      this.models = await this.api.models();
    } catch (error) {
      this.note(say(error.word ?? "broken", error.value));
      if (error.word === "wantsKey") this.settingsPanel.open("key");
      return;
    }
    this.note("");
    $("model").replaceChildren(...this.models.map((card) => new Option(card.id, card.id)));
    $("model").hidden = this.models.length < 2;
    this.choose(this.conversation);
    $("input").focus();
  }

  // Show a conversation.
  choose(conversation) {
    if (this.models.some((card) => card.id === conversation.model)) $("model").value = conversation.model;
    if (this.model && !this.model.has_template) conversation.mode = "text";
    this.conversation = conversation;
    this.messages.editing = "";
    this.draw({ toEnd: true });
  }

  // Keep a conversation, where it has anything.
  keep(conversation) {
    if (!Object.keys(conversation.nodes).length) return;
    try {
      this.store.save(conversation);
    } catch {
      this.note(say("full"));
    }
  }

  // ---- drawing

  // Write all words in the language of the page, in its colours.
  look() {
    const { language, theme, colours } = this.settings;
    const chosen = language || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
    words = WORDS[chosen];
    document.documentElement.lang = chosen === "zh" ? "zh-CN" : "en";
    document.documentElement.dataset.theme = theme;
    document.body.classList.toggle("colours", colours);
    for (const each of document.querySelectorAll("[data-text]")) each.textContent = say(each.dataset.text);
    for (const each of document.querySelectorAll("[data-title]")) each.title = say(each.dataset.title);
    for (const each of document.querySelectorAll("[data-label]")) {
      each.setAttribute("aria-label", say(each.dataset.label));
      if (each.tagName === "BUTTON") each.title = say(each.dataset.label);
    }
  }

  draw({ toEnd = false } = {}) {
    const { conversation, writing } = this;
    const chat = conversation.mode === "chat";
    this.tip.hide();
    $("title").textContent = conversation.title || say("untitled");
    $("thread").classList.toggle("continued", !chat);
    $("thread").replaceChildren(...this.messages.all());
    $("thread").setAttribute("aria-busy", Boolean(writing.now));
    if (toEnd) $("thread").scrollTop = $("thread").scrollHeight;
    $("send").hidden = Boolean(writing.now);
    $("stop").hidden = !writing.now;
    $("input").placeholder = say(chat ? "messageHint" : conversation.shown().length ? "goOnHint" : "textHint");
    this.drawList();
  }

  // Draw the answer that is being written; who has scrolled up stays there.
  redraw(node) {
    const thread = $("thread");
    const box = thread.querySelector(`[data-id="${node.id}"]`);
    if (!box) return;
    const atEnd = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 40;
    this.tip.hide();
    box.querySelector(".text").replaceWith(this.messages.text(node));
    box.querySelector(".stats").textContent = stats(node);
    if (atEnd) thread.scrollTop = thread.scrollHeight;
  }

  drawList() {
    const all = this.store.all();
    if (!all.some(({ id }) => id === this.conversation.id)) all.unshift(this.conversation);
    $("list").replaceChildren(...all.map((each) => this.item(each)));
  }

  item(conversation) {
    const current = conversation.id === this.conversation.id;
    const name = conversation.title || say("untitled");
    const open = element("button", { className: "name", textContent: name, title: name });
    open.onclick = () => this.open(conversation);
    if (current) open.setAttribute("aria-current", "true");
    const made = element("li", { className: current ? "current" : "" }, open);
    if (!conversation.title) return made;
    const actions = { rename: ["✎", () => this.rename(conversation)], remove: ["✕", () => this.remove(conversation)] };
    for (const [word, [textContent, onclick]] of Object.entries(actions)) {
      const button = element("button", { className: "small", textContent, title: say(word), onclick });
      button.setAttribute("aria-label", `${say(word)}: ${name}`);
      made.append(button);
    }
    return made;
  }

  showSide(shown) {
    $("side").classList.toggle("shown", shown);
    $("shade").hidden = !shown;
    $("menu").setAttribute("aria-expanded", shown);
  }

  // ---- conversations

  // Return a conversation of the list as it is here, where it is shown or being written.
  living(conversation) {
    const here = [this.conversation, this.writing.now?.conversation];
    return here.find((each) => each?.id === conversation.id) ?? conversation;
  }

  open(conversation) {
    this.showSide(false);
    this.choose(this.living(conversation));
  }

  begin() {
    this.showSide(false);
    if (this.conversation.shown().length) this.choose(new Conversation({ model: this.model?.id ?? "" }));
    $("input").focus();
  }

  rename(conversation) {
    const name = prompt(say("renameAsk"), conversation.title)?.trim();
    if (!name) return;
    this.living(conversation).title = name;
    this.keep(this.living(conversation));
    this.draw();
  }

  remove(conversation) {
    if (!confirm(say("removeAsk", conversation.title))) return;
    const { now } = this.writing;
    if (now?.conversation.id === conversation.id) {
      now.removed = true;
      this.writing.halt();
    }
    this.store.remove(conversation);
    if (this.conversation.id === conversation.id) this.choose(this.store.all()[0] ?? new Conversation());
    else this.draw();
  }

  // Add the conversations of a file.
  async import(file) {
    try {
      const records = (await file.text()).trim().split("\n").map((line) => JSON.parse(line));
      const made = records.map((record) => Conversation.of(record, file.name.replace(/\.jsonl?$/, "")));
      for (const each of made) this.keep(each);
      this.open(made.at(-1));
    } catch (error) {
      this.note(say("notOpened", error.message));
    }
  }

  export() {
    const name = (this.conversation.title || say("untitled")).replace(/[\\/:*?"<>|\s]+/g, " ").trim().slice(0, 40);
    const blob = new Blob([`${JSON.stringify(this.conversation.record())}\n`], { type: "application/json" });
    const link = element("a", { href: URL.createObjectURL(blob), download: `${name}.jsonl` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // ---- messages

  setMode(mode) {
    this.conversation.mode = mode;
    this.draw();
    $("input").focus();
  }

  // Send what is typed; return whether it is sent. A question without an answer is replaced; where a text is continued,
  // the model goes on after an empty one.
  send(text) {
    if (this.writing.now || !this.model) return false;
    const { conversation } = this;
    const last = conversation.shown().at(-1);
    if (conversation.mode === "text" && last && !text) {
      this.answer(last.id);
      return true;
    }
    if (!text.trim()) return false;
    const unanswered = conversation.mode === "chat" && last?.role === "user";
    this.answer(conversation.add(unanswered ? last.parent : last?.id ?? "", "user", text).id);
    return true;
  }

  // Let the model answer a message, once more where it has an answer.
  answer(parent) {
    if (this.model) this.writing.answer(this.conversation, this.model, parent);
  }

  // Put another text in the place of a message, beside the old one; a question is asked.
  replace(node, text) {
    const made = this.conversation.add(node.parent, node.role, text);
    this.keep(this.conversation);
    if (node.role === "user") this.answer(made.id);
    else this.draw();
  }

  // Show another version of a message.
  pick(node) {
    this.conversation.picked[node.parent] = node.id;
    this.keep(this.conversation);
    this.draw();
  }

  async copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      this.note(say("copied"));
    } catch { // not over plain http from another machine
      this.note(say("copyFailed"));
    }
  }
}
