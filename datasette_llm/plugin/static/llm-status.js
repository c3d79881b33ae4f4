// Keeps the page of the server's state up to date. Without it everything works but has to be reloaded.
(() => {
  const page = document.querySelector("main.llm");
  if (!page) return;
  const seconds = Number(page.dataset.interval);
  const live = `${page.dataset.json}?live=1`;

  const away = ({ what, seconds, next_try }) =>
    `${what}, for ${seconds.toFixed(0)} s; next try in ${next_try.toFixed(0)} s`;

  // The same words as in llm_status.html.
  const words = {
    count: (value) => value.toLocaleString("en"),
    number: (value) => String(value),
    seconds: (value) => (value ? `${value.toFixed(1)} s` : "none"),
    dollars: (value) => (value === null ? "unknown" : `$${value.toFixed(4)}`),
    rates: (value) =>
      Object.entries(value).map(([source, rate]) => `${rate.toFixed(1)} a second, ${source}`).join("; ") ||
      "not known",
    state: (value, row) => (row.away ? `${value}: ${away(row.away)}` : value),
    doing: (value, row) => (row.waiting_for ? `${value}: ${row.waiting_for}` : value),
    rows: (value, row) => words.count(value) + (row.total === null ? "" : ` of ${words.count(row.total)}`),
    text: (value) => (value === null ? "none" : String(value)),
  };
  const at = (row, key) => key.split(".").reduce((value, name) => value[name], row);
  const say = (row, { key, kind }) => words[kind](at(row, key), row);

  // Only what differs is touched: a screen reader or a selection is not thrown out of what it reads.
  const put = (element, text) => {
    if (element.textContent !== text) element.textContent = text;
  };

  const fill = (table, rows) => {
    const columns = [...table.tHead.rows[0].cells].map((cell) => ({ ...cell.dataset, title: cell.textContent }));
    const body = table.tBodies[0];
    while (body.rows.length > rows.length) body.deleteRow(-1);
    rows.forEach((row, index) => {
      const line = body.rows[index] || body.insertRow();
      line.setAttribute("role", "row");
      columns.forEach((column, place) => {
        const cell = line.cells[place] || line.insertCell();
        cell.setAttribute("role", "cell");
        cell.dataset.kind = column.kind;
        cell.dataset.title = column.title;
        if (column.kind === "state") cell.dataset.state = at(row, column.key);
        if (column.kind === "link") {
          const link = cell.querySelector("a") || cell.appendChild(document.createElement("a"));
          link.href = row.path;
          put(link, at(row, column.key));
        } else {
          put(cell, say(row, column));
        }
      });
    });
    table.hidden = !rows.length;
    page.querySelector(`[data-empty="${table.dataset.rows}"]`).hidden = Boolean(rows.length);
  };

  const draw = (minutes) => {
    const parts = ["answered", "refused", "failed"];
    const most = Math.max(...minutes.map((minute) => parts.reduce((sum, part) => sum + minute[part], 0)));
    const bars = page.querySelectorAll("[data-chart] g");
    minutes.forEach((minute, index) => {
      let y = 100;
      parts.forEach((part, place) => {
        const height = most ? (100 * minute[part]) / most : 0;
        y -= height;
        const rect = bars[index].children[place];
        rect.setAttribute("y", y.toFixed(2));
        rect.setAttribute("height", height.toFixed(2));
      });
    });
    put(page.querySelector("[data-most]"), words.count(most));
  };

  const show = (news) => {
    for (const name of ["jobs", "groups", "workers", "lanes"]) fill(page.querySelector(`[data-rows="${name}"]`), news[name]);
    for (const figure of page.querySelectorAll("dd[data-key]")) put(figure, say(news, figure.dataset));
    draw(news.minutes);
    const time = page.querySelector("[data-as-of]");
    time.dateTime = news.generated_at;
    put(time, `${news.generated_at.slice(11, 19)} UTC`);
  };

  const switched = page.querySelector("[data-updating]");
  const box = switched.querySelector("input");
  const trouble = page.querySelector("[data-trouble]");
  switched.hidden = false;

  const update = async () => {
    if (box.checked && !document.hidden) {
      try {
        const answer = await fetch(live, { headers: { accept: "application/json" } });
        if (!answer.ok) throw new Error(`status ${answer.status}`);
        show(await answer.json());
        put(trouble, "");
      } catch (error) {
        put(trouble, "The server does not answer; trying again.");
      }
    }
    setTimeout(update, seconds * 1000);
  };
  setTimeout(update, seconds * 1000);

  const form = page.querySelector("form[data-test]");
  const button = form.querySelector("button");
  const result = form.querySelector("[data-result]");
  const paragraph = (text, kind) => {
    const element = document.createElement("p");
    if (kind) element.className = kind;
    element.textContent = text;
    result.append(element);
    return element;
  };
  const tell = (told) => {
    result.replaceChildren();
    const said = paragraph("", told.ok ? "llm-good" : "llm-bad");
    const who = document.createElement("strong");
    who.textContent = `${told.model || "No model"} ${told.ok ? "answered" : "did not answer"}`;
    said.append(who, ` after ${told.seconds.toFixed(2)} s: ${told.ok ? told.answer : told.error}`);
    if (told.remedy) paragraph(told.remedy);
    if (told.ok && told.input_tokens !== null) {
      const cost = told.cost === null ? "no price known" : `$${told.cost.toFixed(6)}`;
      paragraph(`${told.input_tokens} tokens sent, ${told.output_tokens} received, ${cost}.`);
    }
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    button.setAttribute("aria-disabled", "true");
    result.replaceChildren();
    paragraph("Waiting for the answer.");
    try {
      const answer = await fetch(form.action, {
        method: "POST",
        headers: { accept: "application/json" },
        body: new URLSearchParams(new FormData(form)),
      });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      tell(await answer.json());
    } catch (error) {
      result.replaceChildren();
      paragraph("The server does not answer. Reload this page and try again.", "llm-bad");
    }
    button.removeAttribute("aria-disabled");
  });
})();
