"use strict";
// The likeliest alternatives of a token, and the settings.

// Return a token as it can be read: spaces and ends of lines are visible.
function visible(name) {
  return name.replace(/^bytes:/, "").replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(1)} %` : "< 0.1 %";
}

class Tip {
  constructor(box, writing) {
    this.box = box;
    this.writing = writing;
    this.at = null; // the token that is pointed at
    const thread = $("thread");
    thread.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".t");
      if (span) this.show(span);
      else this.hide();
    });
    thread.addEventListener("pointerleave", () => this.hide());
    thread.addEventListener("scroll", () => this.hide());
    thread.addEventListener("focusout", () => this.hide());
    thread.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step && event.target.matches(".text")) this.move(event, step);
    });
  }

  // Show the next or previous token of the answer that has the focus.
  move(event, step) {
    const all = [...event.target.querySelectorAll(".t")];
    if (!all.length) return;
    event.preventDefault();
    const at = all.indexOf(this.at);
    const next = all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(Math.max(at + step, 0), all.length - 1)];
    next.scrollIntoView({ block: "nearest" });
    this.show(next);
  }

  // Show the alternatives of the tokens in a span: those up to the token of the next span; a character may need several.
  show(span) {
    const id = span.closest(".message")?.dataset.id;
    const tokens = this.writing.tokens.get(id);
    if (!tokens) return;
    this.hide();
    this.at = span;
    span.classList.add("at");
    const first = Number(span.dataset.token);
    const others = [...span.closest(".text").querySelectorAll(".t")].map((each) => Number(each.dataset.token));
    const end = Math.min(...others.filter((other) => other > first), first + 4);
    this.box.replaceChildren(...tokens.slice(first, end).map((token) => this.table(token)));
    this.box.hidden = false;
    this.place(span.getClientRects()[0]);
  }

  table(token) {
    const rows = token.top.some(([name]) => name === token.name) ? token.top : [...token.top, [token.name, token.logprob]];
    const head = element("tr", {}, element("th", { textContent: say("token") }), element("th", { className: "number", textContent: say("probability") }), element("th"));
    const body = rows.map(([name, logprob]) => {
      const bar = element("meter", { value: Math.exp(logprob), max: 1 });
      bar.setAttribute("aria-hidden", "true");
      const cells = [
        element("td", { textContent: visible(name) }), element("td", { className: "number", textContent: percent(logprob) }),
        element("td", {}, bar),
      ];
      return element("tr", { className: name === token.name ? "drawn" : "" }, ...cells);
    });
    return element("table", {}, head, ...body);
  }

  place(rect) {
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const below = rect.bottom + 6 + height < window.innerHeight;
    this.box.style.top = `${below ? rect.bottom + 6 : Math.max(4, rect.top - height - 6)}px`;
    this.box.style.left = `${Math.max(8, Math.min(rect.left, window.innerWidth - width - 8))}px`;
  }

  // Return whether there was something to hide.
  hide() {
    const shown = !this.box.hidden;
    this.at?.classList.remove("at");
    this.at = null;
    this.box.hidden = true;
    return shown;
  }
}

class SettingsPanel {
  constructor(page) {
    this.page = page;
    this.dialog = $("settings");
    this.numbers = {};
    for (const [name, [min, max, step]] of Object.entries(NUMBERS)) {
      const input = element("input", { type: "number", id: name, min, max, step: "any" });
      if (Number.isInteger(step)) input.step = step;
      input.inputMode = Number.isInteger(step) ? "numeric" : "decimal";
      const label = element("span");
      label.dataset.text = name;
      $("numbers").append(element("label", {}, label, input));
      this.numbers[name] = input;
    }
    this.dialog.addEventListener("input", () => this.take());
    this.dialog.addEventListener("close", () => this.closed());
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    $("key").addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.dialog.close();
    });
  }

  // Show the settings, with the cursor in the field `id`.
  open(id = "") {
    const { settings, conversation, store, model } = this.page;
    this.asksKey ||= id === "key" || Boolean(store.key);
    $("key-field").hidden = !this.asksKey;
    for (const [name, input] of Object.entries(this.numbers)) {
      input.value = settings.numbers[name] ?? "";
      const own = model?.sampling[name === "max_tokens" ? "max_new_tokens" : name];
      input.placeholder = name === "seed" ? say("random") : own ?? (model ? 0 : "");
    }
    $("stops").value = settings.stops;
    $("key").value = store.key;
    $("system").value = conversation.system;
    $("system-field").hidden = conversation.mode === "text";
    for (const name of ["language", "theme"]) $(name).value = settings[name];
    for (const name of ["probabilities", "colours"]) $(name).checked = settings[name];
    this.keyBefore = store.key;
    if (!this.dialog.open) this.dialog.showModal();
    if (id) $(id).focus();
  }

  // Take over what is set, field by field; a number out of its range is not taken.
  take() {
    const { settings, conversation, store } = this.page;
    for (const [name, input] of Object.entries(this.numbers)) {
      if (input.value === "" && !input.validity.badInput) delete settings.numbers[name];
      else if (input.validity.valid) settings.numbers[name] = Number(input.value);
    }
    settings.stops = $("stops").value;
    store.key = $("key").value.trim();
    conversation.system = $("system").value;
    for (const name of ["language", "theme"]) settings[name] = $(name).value;
    for (const name of ["probabilities", "colours"]) settings[name] = $(name).checked;
    store.settings = settings;
    this.page.look();
  }

  closed() {
    this.page.keep(this.page.conversation);
    this.page.draw();
    if (this.page.store.key !== this.keyBefore || !this.page.model) this.page.connect();
  }
}
