"use strict";
// Keys and buttons, and the start.

function listenToComposer(page) {
  const input = $("input");
  const grow = () => {
    input.style.height = "auto";
    input.style.height = `${input.scrollHeight}px`;
  };
  const submit = () => {
    if (!page.send(input.value)) return;
    input.value = "";
    grow();
  };
  input.oninput = grow;
  input.onkeydown = (event) => {
    // an Enter that ends the writing of Chinese letters is not for us
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    submit();
  };
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    submit();
  };
  $("stop").onclick = () => page.writing.halt();
}

function listen(page) {
  $("new").onclick = () => page.begin();
  $("menu").onclick = () => page.showSide(!$("side").classList.contains("shown"));
  $("shade").onclick = () => page.showSide(false);
  $("open").onclick = () => page.settingsPanel.open();
  $("export").onclick = () => page.export();
  $("import").onclick = () => $("file").click();
  $("file").onchange = async () => {
    const [file] = $("file").files;
    if (file) await page.import(file);
    $("file").value = "";
  };
  $("model").onchange = () => {
    page.conversation.model = $("model").value;
    page.choose(page.conversation);
  };
  $("thread").addEventListener("click", (event) => {
    const code = event.target.closest("[data-copy]")?.closest(".code");
    if (code) page.copy(code.querySelector("pre").textContent);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("settings").open) return;
    page.showSide(false);
    if (!page.tip.hide()) page.writing.halt();
  });
  window.addEventListener("storage", () => page.drawList()); // another window
  window.addEventListener("pagehide", () => page.writing.now && page.keep(page.writing.now.conversation));
}

const page = new Page();
listenToComposer(page);
listen(page);
page.look();
page.draw();
page.connect();
