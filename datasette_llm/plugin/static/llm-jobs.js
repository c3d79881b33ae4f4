// What moves on the pages of jobs. Without this file they work too: they show how things were when opened.
(() => {
  "use strict";

  // Columns go into the prompt where the cursor is.
  const prompt = document.getElementById("prompt");
  for (const button of document.querySelectorAll("[data-insert]")) {
    button.disabled = false;
    button.setAttribute("aria-label", `Put ${button.textContent} into the prompt`);
    button.addEventListener("click", () => {
      prompt.setRangeText(button.dataset.insert, prompt.selectionStart, prompt.selectionEnd, "end");
      prompt.focus();
    });
  }

  // What came of sending the form is what a person wants to see next.
  document.querySelector("[data-focus]")?.focus();

  const page = document.querySelector("[data-events]");
  if (!page || !window.EventSource) return;
  const live = page.querySelector("[data-live]");
  const said = page.querySelector("[data-said]");
  const hint = page.querySelector("[data-reload]");
  const SAY_MILLISECONDS = 20000;
  let saidAt = Date.now();

  // Part by part, and not where the focus or a selection is: a link must not vanish under a finger.
  const show = (html) => {
    const made = new DOMParser().parseFromString(html, "text/html");
    for (const part of made.querySelectorAll("[data-part]")) {
      const shown = live.querySelector(`[data-part="${part.dataset.part}"]`);
      if (!shown || shown.contains(document.activeElement)) continue;
      const selection = document.getSelection();
      if (selection && !selection.isCollapsed && shown.contains(selection.anchorNode)) continue;
      if (shown.innerHTML !== part.innerHTML) shown.innerHTML = part.innerHTML;
    }
  };

  const source = new EventSource(page.dataset.events);
  source.onopen = () => { hint.hidden = true; };
  source.onmessage = (event) => {
    const told = JSON.parse(event.data);
    if (told.state !== page.dataset.state) {
      source.close();
      location.reload(); // Other buttons.
      return;
    }
    show(told.html);
    if (Date.now() - saidAt > SAY_MILLISECONDS) {
      saidAt = Date.now();
      said.textContent = told.said;
    }
  };
  source.addEventListener("end", () => {
    source.close();
    location.reload();
  });
  source.onerror = () => { if (source.readyState === EventSource.CLOSED) hint.hidden = false; };
})();
