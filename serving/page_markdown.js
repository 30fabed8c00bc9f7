"use strict";
// Markdown to nodes of the document. Text of a model only ever becomes a text node, never HTML; links lead to http, https
// and mailto, and pictures are shown as links. Every character remembers its place in the source, so that it can belong to
// a token.

const DEEPEST = 12; // lists and quotes in each other; what is deeper is a paragraph
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+|$)/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( {1,4}|$)/;
const BETWEEN = /^ *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$/; // below the head of a table
const LINK = /!?\[([^[\]\n]*)\]\( *<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: +"[^"\n]*")? *\)/y;
const ADDRESS = /https?:\/\/[^\s<>()"'`，。；：！？、（）「」『』《》“”]+/y;
const MARKS = { "***": ["em", "strong"], "**": ["strong"], "__": ["strong"], "~~": ["del"], "*": ["em"], "_": ["em"] };
const WORD = /[\p{L}\p{N}]/u;

// Return a new element with a text or children.
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// A text with the place of each of its characters in the source.
class Placed {
  constructor(text, places) {
    this.text = text;
    this.places = places;
  }

  slice(from, to) {
    return new Placed(this.text.slice(from, to), this.places.slice(from, to));
  }

  static join(lines) {
    const places = lines.flatMap((line, i) => (i ? [lines[i - 1].end, ...line.places] : line.places));
    return new Placed(lines.map((line) => line.text).join("\n"), places);
  }
}

class Markdown {
  // owners: the token of each character of the source, or null
  constructor(source, owners, words) {
    this.owners = owners;
    this.words = words;
    let at = 0;
    this.lines = source.split("\n").map((text) => {
      const line = new Placed(text, Array.from({ length: text.length }, (_, i) => at + i));
      line.end = at += text.length;
      at += 1;
      return line;
    });
  }

  // Return the nodes of the whole source.
  nodes() {
    const all = document.createDocumentFragment();
    this.blocks(this.lines, all, 0);
    return all;
  }

  // Append a text as it is, in spans of one token each.
  put(parent, { text, places }) {
    for (let from = 0, to; from < text.length; from = to) {
      const owner = this.owners?.[places[from]];
      for (to = from + 1; to < text.length && this.owners?.[places[to]] === owner; to += 1);
      const piece = document.createTextNode(text.slice(from, to));
      if (owner === undefined) {
        parent.append(piece);
      } else {
        const span = element("span", { className: "t" }, piece);
        span.dataset.token = owner;
        parent.append(span);
      }
    }
  }

  blocks(lines, parent, depth) {
    let i = 0;
    while (i < lines.length) i = this.block(lines, i, parent, depth);
  }

  // Append the block that begins with line i; return the number of the line after it.
  block(lines, i, parent, depth) {
    const { text } = lines[i];
    if (!text.trim()) return i + 1;
    if (FENCE.test(text)) return this.code(lines, i, parent);
    if (HEADING.test(text)) {
      const level = HEADING.exec(text)[1].length;
      const made = element(`h${Math.min(level + 2, 6)}`);
      this.inline(trimmed(lines[i], HEADING, /[ \t]+#+[ \t]*$/), made);
      parent.append(made);
      return i + 1;
    }
    if (RULE.test(text)) {
      parent.append(element("hr"));
      return i + 1;
    }
    if (depth < DEEPEST && QUOTE.test(text)) {
      let end = i;
      while (end < lines.length && QUOTE.test(lines[end].text)) end += 1;
      const made = element("blockquote");
      this.blocks(lines.slice(i, end).map((line) => trimmed(line, QUOTE)), made, depth + 1);
      parent.append(made);
      return end;
    }
    if (depth < DEEPEST && ITEM.test(text)) return this.list(lines, i, parent, depth);
    if (text.includes("|") && BETWEEN.test(lines[i + 1]?.text ?? "") && lines[i + 1].text.includes("-")) {
      return this.table(lines, i, parent);
    }
    return this.paragraph(lines, i, parent, depth);
  }

  paragraph(lines, i, parent, depth) {
    let end = i + 1;
    const others = depth < DEEPEST ? [FENCE, HEADING, RULE, QUOTE, ITEM] : [FENCE, HEADING, RULE];
    while (end < lines.length && lines[end].text.trim() && !others.some((other) => other.test(lines[end].text))) end += 1;
    const made = element("p");
    this.inline(Placed.join(lines.slice(i, end)), made);
    parent.append(made);
    return end;
  }

  code(lines, i, parent) {
    const [, fence, language] = FENCE.exec(lines[i].text);
    let end = i + 1;
    const closing = (text) => text.trim().startsWith(fence) && !text.trim().replaceAll(fence[0], "");
    while (end < lines.length && !closing(lines[end].text)) end += 1;
    const inner = element("code");
    this.put(inner, Placed.join(lines.slice(i + 1, end)));
    const copy = element("button", { type: "button", textContent: this.words.copy });
    copy.dataset.copy = "code";
    const head = element("div", {}, element("span", { textContent: language }), copy);
    parent.append(element("div", { className: "code" }, head, element("pre", { tabIndex: 0 }, inner)));
    return end + 1;
  }

  list(lines, i, parent, depth) {
    const [, , mark] = ITEM.exec(lines[i].text);
    const numbered = /\d/.test(mark);
    const isNext = (text) => ITEM.exec(text)?.[2].at(-1) === mark.at(-1) && !RULE.test(text);
    const made = element(numbered ? "ol" : "ul");
    if (numbered && parseInt(mark, 10) !== 1) made.start = parseInt(mark, 10);
    while (i < lines.length && isNext(lines[i].text)) {
      const width = ITEM.exec(lines[i].text)[0].length;
      const inner = [trimmed(lines[i], ITEM)];
      for (i += 1; i < lines.length; i += 1) {
        const { text } = lines[i];
        const indent = text.length - text.trimStart().length;
        const goesOn = text.trim() ? indent >= Math.min(width, 2) : lines[i + 1]?.text.startsWith("  ");
        if (!goesOn) break;
        inner.push(cut(lines[i], Math.min(width, indent)));
      }
      const item = element("li");
      this.blocks(inner, item, depth + 1);
      made.append(item);
      while (i < lines.length && !lines[i].text.trim() && ITEM.test(lines[i + 1]?.text ?? "")) i += 1;
    }
    parent.append(made);
    return i;
  }

  table(lines, i, parent) {
    const made = element("table");
    const row = (line, name) => {
      const tr = element("tr");
      for (const cell of cells(line)) {
        const td = element(name);
        this.inline(cell, td);
        tr.append(td);
      }
      made.append(tr);
    };
    row(lines[i], "th");
    for (i += 2; i < lines.length && lines[i].text.includes("|"); i += 1) row(lines[i], "td");
    parent.append(element("div", { className: "table" }, made));
    return i;
  }

  // Append a text in which marks of emphasis, code and links mean something.
  inline(placed, parent, depth = 0) {
    const { text } = placed;
    const missing = new Set(); // marks that do not end anywhere below
    let plain = 0; // from here to i: not yet appended
    let i = 0;
    const flush = () => this.put(parent, placed.slice(plain, i));
    const taken = (length) => {
      i += length;
      plain = i;
    };
    while (i < text.length) {
      const [length, append] = this.special(placed, i, missing, depth) ?? [0];
      if (length) {
        flush();
        append(parent);
        taken(length);
      } else {
        i += 1;
      }
    }
    flush();
  }

  // Return the length of what begins at i and is not plain text, and a function that appends it; undefined otherwise.
  special(placed, i, missing, depth) {
    const { text } = placed;
    const letter = text[i];
    if (letter === "\n") return [1, (parent) => parent.append(element("br"))];
    if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      return [2, (parent) => this.put(parent, placed.slice(i + 1, i + 2))];
    }
    if (letter === "`") return this.quoted(placed, i, missing);
    if (letter === "[" || letter === "!") {
      LINK.lastIndex = i;
      const found = LINK.exec(text);
      if (!found || !isSafe(found[2])) return undefined;
      const start = i + found[0].indexOf("[") + 1;
      const shown = found[1] ? placed.slice(start, start + found[1].length) : placed.slice(i, i + found[0].length);
      return [found[0].length, (parent) => parent.append(this.link(found[2], shown))];
    }
    if (letter === "h" && !WORD.test(text[i - 1] ?? "")) {
      ADDRESS.lastIndex = i;
      const found = ADDRESS.exec(text)?.[0].replace(/[.,;:!?*_~|\]]+$/, "");
      if (!found || !isSafe(found)) return undefined;
      return [found.length, (parent) => parent.append(this.link(found, placed.slice(i, i + found.length)))];
    }
    return depth < DEEPEST && "*_~".includes(letter) ? this.emphasis(placed, i, missing, depth) : undefined;
  }

  quoted(placed, i, missing) {
    const { text } = placed;
    const mark = /^`+/.exec(text.slice(i, i + 50))[0];
    if (missing.has(mark)) return undefined;
    let end = text.indexOf(mark, i + mark.length);
    while (end >= 0 && text[end + mark.length] === "`") { // a longer run of backticks is not the end
      while (text[end] === "`") end += 1;
      end = text.indexOf(mark, end);
    }
    if (end < 0) {
      missing.add(mark);
      return [mark.length, (parent) => this.put(parent, placed.slice(i, i + mark.length))];
    }
    return [end + mark.length - i, (parent) => {
      const made = element("code");
      this.put(made, placed.slice(i + mark.length, end));
      parent.append(made);
    }];
  }

  emphasis(placed, i, missing, depth) {
    const { text } = placed;
    const mark = Object.keys(MARKS).find((each) => text.startsWith(each, i));
    if (!mark || missing.has(mark)) return undefined;
    const from = i + mark.length;
    const inWord = mark[0] === "_";
    if (!/\S/.test(text[from] ?? " ") || (inWord && WORD.test(text[i - 1] ?? ""))) return undefined;
    let end = text.indexOf(mark, from + 1);
    const ends = () => /\S/.test(text[end - 1]) && !(inWord && WORD.test(text[end + mark.length] ?? "")) &&
      !(mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark));
    while (end >= 0 && !ends()) end = text.indexOf(mark, end + 1);
    if (end < 0) {
      missing.add(mark);
      return undefined;
    }
    while (mark.length === 2 && text[end + 2] === mark[0]) end += 1; // **a *b***: the first star belongs to b
    return [end + mark.length - i, (parent) => {
      const nested = MARKS[mark].map((name) => element(name));
      nested[0].append(...nested.slice(1));
      this.inline(placed.slice(from, end), nested.at(-1), depth + 1);
      parent.append(nested[0]);
    }];
  }

  link(address, shown) {
    const made = element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });
    this.put(made, shown);
    return made;
  }
}

// Return a line without its first n characters.
function cut(line, n) {
  return Object.assign(line.slice(n), { end: line.end });
}

// Return a line without a beginning, and without an end.
function trimmed(line, beginning, end) {
  const rest = cut(line, beginning.exec(line.text)?.[0].length ?? 0);
  const stop = end ? rest.text.search(end) : -1;
  return stop < 0 ? rest : rest.slice(0, stop);
}

// Return the cells of a row of a table.
function cells(line) {
  const borders = [...line.text.matchAll(/(?<!\\)\|/g)].map((match) => match.index);
  const edges = [-1, ...borders, line.text.length];
  const all = edges.slice(1).map((edge, i) => line.slice(edges[i] + 1, edge));
  if (!all[0].text.trim()) all.shift();
  if (all.length && !all.at(-1).text.trim()) all.pop();
  return all.map((cell) => {
    const start = cell.text.length - cell.text.trimStart().length;
    return cell.slice(start, Math.max(start, cell.text.trimEnd().length));
  });
}

// Return whether a link may lead to an address.
function isSafe(address) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}
