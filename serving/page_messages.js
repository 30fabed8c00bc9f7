"use strict";
// How messages look.

class Messages {
  constructor(page, writing) {
    this.page = page;
    this.writing = writing;
    this.editing = ""; // id of the message that is being edited
  }

  // Return the nodes of the conversation that is shown.
  all() {
    const { conversation } = this.page;
    const shown = conversation.shown();
    const nodes = shown.length ? shown.map((node) => this.one(node, node === shown.at(-1))) : [this.hello()];
    if (this.writing.failed?.conversation === conversation) nodes.push(this.failure(this.writing.failed));
    return nodes;
  }

  // Return what stands in the place of messages where there are none.
  hello() {
    const { model, conversation } = this.page;
    const box = element("div", { className: "hello" }, element("h2", { textContent: model?.id ?? "" }));
    if (!model) return box;
    const chat = conversation.mode === "chat";
    if (model.has_template) {
      const modes = ["chat", "text"].map((mode) => {
        const choose = () => this.page.setMode(mode);
        const made = element("button", { type: "button", textContent: say(mode), onclick: choose });
        made.setAttribute("aria-pressed", conversation.mode === mode);
        return made;
      });
      box.append(element("div", { className: "choice", role: "group" }, ...modes));
    }
    const examples = chat ? model.examples : [];
    const word = chat ? (examples.length ? "hello" : "") : model.has_template ? "helloText" : "noTemplate";
    if (word) box.append(element("p", { textContent: say(word) }));
    const items = examples.map((textContent) => {
      const send = () => this.page.send(textContent);
      return element("li", {}, element("button", { type: "button", textContent, onclick: send }));
    });
    box.append(element("ul", {}, ...items));
    return box;
  }

  one(node, isLast) {
    const going = this.writing.now?.node === node;
    const box = element("article", { className: `message ${node.role}${going ? " running" : ""}` });
    box.dataset.id = node.id;
    box.append(element("span", { className: "who", textContent: say(node.role === "user" ? "you" : "it") }));
    if (this.editing === node.id) box.append(this.editor(node));
    else box.append(this.text(node), this.tools(node, going, isLast));
    return box;
  }

  // Return the text of a message: an answer in a chat has Markdown, and all answers have tokens.
  text(node) {
    const box = element("div", { className: "text" });
    if (node.role === "user") {
      box.textContent = node.text;
      return box;
    }
    const tokens = this.writing.tokens.get(node.id) ?? [];
    const owners = ownersOf(node.text, tokens);
    const markdown = new Markdown(node.text, owners, words);
    if (this.page.conversation.mode === "text") markdown.put(box, Placed.join(markdown.lines));
    else appendAnswer(markdown, box);
    if (!owners) return box;
    for (const span of box.querySelectorAll(".t")) {
      const p = Math.exp(tokens[span.dataset.token].logprob);
      span.classList.add(p > 0.8 ? "sure" : p > 0.3 ? "likely" : p > 0.05 ? "unsure" : "guess");
    }
    box.tabIndex = 0;
    box.setAttribute("aria-description", say("tokensHelp"));
    return box;
  }

  // Return the buttons below a message.
  tools(node, going, isLast) {
    const { page } = this;
    const box = element("div", { className: "tools" });
    const button = (word, onclick, disabled = false, textContent = say(word)) => {
      const made = element("button", { type: "button", textContent, title: say(word), onclick, disabled });
      made.setAttribute("aria-label", say(word));
      box.append(made);
    };
    const versions = page.conversation.versions(node);
    if (versions.length > 1) {
      const at = versions.indexOf(node);
      button("previous", () => page.pick(versions[at - 1]), at === 0, "‹");
      box.append(element("span", { className: "version", textContent: `${at + 1}/${versions.length}` }));
      button("next", () => page.pick(versions[at + 1]), at === versions.length - 1, "›");
    }
    if (!going) {
      const busy = Boolean(this.writing.now);
      button("copy", () => page.copy(node.text));
      button("edit", () => this.edit(node), busy);
      if (node.role === "assistant") button("again", () => page.answer(node.parent), busy);
      else if (isLast && !this.writing.failed) button("retry", () => page.answer(node.id), busy);
    }
    if (node.role === "assistant") box.append(element("span", { className: "stats", textContent: stats(node) }));
    return box;
  }

  failure({ parent, error }) {
    const again = () => this.page.answer(parent);
    const box = element("div", { className: "error", role: "alert" });
    box.append(element("b", { textContent: say(error.word ?? "broken", error.value) }));
    if (error.message) box.append(element("small", { textContent: error.message }));
    box.append(element("button", { type: "button", textContent: say("retry"), onclick: again }));
    return box;
  }

  edit(node) {
    this.editing = node.id;
    this.page.draw();
    const area = $("thread").querySelector("textarea");
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  // Return the field in which a message is edited. A question is asked anew beside the old one; an answer is kept as it
  // is then.
  editor(node) {
    const isQuestion = node.role === "user";
    const area = element("textarea", { value: node.text });
    area.setAttribute("aria-label", say("edit"));
    const close = () => {
      this.editing = "";
      this.page.draw();
    };
    const done = () => {
      this.editing = "";
      if (area.value === node.text && !isQuestion) close();
      else this.page.replace(node, area.value);
    };
    area.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) done();
    };
    const button = (word, onclick) => element("button", { type: "button", textContent: say(word), onclick });
    const buttons = [button(isQuestion ? "send" : "keepEdited", done), button("cancel", close)];
    return element("div", { className: "editor" }, area, element("div", { className: "row" }, ...buttons));
  }
}

// Append an answer to an element; its thoughts, where it has any, are folded away.
function appendAnswer(markdown, box) {
  const whole = Placed.join(markdown.lines);
  const found = /^\s*<think>\n?([^]*?)(?:<\/think>\s*|$)/.exec(whole.text);
  if (!found) {
    markdown.blocks(markdown.lines, box, 0);
    return;
  }
  const [all, thought] = found;
  const start = all.length - all.trimStart().length + "<think>".length;
  const inner = element("div", { className: "plain" });
  markdown.put(inner, whole.slice(start, start + thought.length + 1));
  const summary = element("summary", { textContent: say("thought") });
  box.append(element("details", { className: "thought", open: all.length === whole.text.length }, summary, inner));
  const first = all.split("\n").length - 1;
  const lines = markdown.lines.slice(first);
  lines[0] = cut(lines[0], all.length - all.lastIndexOf("\n") - 1);
  markdown.blocks(lines, box, 0);
}

// Return what is told below an answer.
function stats({ n, rate, wait, reason, used, context, gone }) {
  const parts = n ? [say("nTokens", n)] : [];
  if (rate) parts.push(say("rate", rate.toFixed(rate < 10 ? 1 : 0)));
  if (wait !== undefined) parts.push(say("first", wait.toFixed(2)));
  if (used) parts.push(say("used", used, context));
  if (reason === "length") parts.push(say("cut"));
  if (reason === "stopped") parts.push(say("stopped"));
  if (gone) parts.push(say("forgotten", gone));
  return parts.join(" · ");
}
