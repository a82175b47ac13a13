"use strict";
// Rows come as JSON and go into the page as text nodes, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("rows").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("list");
  const state = { page: 0 };
  const sorts = {
    row: (row) => row.row,
    id: (row) => row.id,
    error: (row) => row.error || "\uffff",
    tokens: (row) => row.tokens ?? -1,
    promptTokens: (row) => row.promptTokens ?? -1,
    seconds: (row) => row.seconds ?? -1,
    length: (row) => (row.answers.length ? row.answers[0].text.length : -1),
    difference: (row) => row.difference ?? -1,
  };
  const collator = new Intl.Collator(undefined, { numeric: true });
  const LONG = 900;

  for (const row of data) {
    // One lower-cased text a row, made once: a search then is one pass over strings.
    row.haystack = [
      row.id, row.file, row.status, row.error, row.message, row.prompt ?? "",
      ...row.answers.map((answer) => answer.text),
      ...row.fields.map((field) => field.join(" ")),
    ].join("\n").toLowerCase();
  }

  function element(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) {
      if (name === "text") node.textContent = value;
      else if (name === "class") node.className = value;
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function chosen() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = byId("status").value;
    const error = byId("error").value;
    const found = data.filter((row) =>
      (!status || row.status === status) &&
      (!error || row.error === error) &&
      words.every((word) => row.haystack.includes(word)));
    const key = sorts[byId("sort").value];
    const sign = byId("order").value === "down" ? -1 : 1;
    return found
      .map((row) => [key(row), row])
      .sort(([a, one], [b, two]) => {
        const by = typeof a === "string" ? collator.compare(a, b) : a - b;
        return sign * by || one.row - two.row;
      })
      .map(([, row]) => row);
  }

  function textBlock(label, text) {
    const body = element("div", { class: "text", dir: "auto" });
    const block = element("div", {}, element("div", { class: "label", text: label }), body);
    if (text.length <= LONG + 200) {
      body.append(text || element("span", { class: "soft", text: "empty" }));
      return block;
    }
    const count = text.length.toLocaleString("en");
    const button = element("button", { class: "plain", type: "button", "aria-expanded": "false" });
    const show = (isOpen) => {
      body.textContent = isOpen ? text : text.slice(0, LONG) + "…";
      button.textContent = isOpen ? "Show less" : `Show all ${count} characters`;
      button.setAttribute("aria-expanded", String(isOpen));
    };
    button.addEventListener("click", () => show(button.getAttribute("aria-expanded") === "false"));
    show(false);
    block.append(button);
    return block;
  }

  function answerBlock(answer) {
    if (!answer.parts) return textBlock(answer.label, answer.text);
    // A comparison: which words differ, marked up for eyes and screen readers.
    const body = element("div", { class: "text", dir: "auto" });
    for (const [isChanged, text] of answer.parts) {
      body.append(isChanged ? element(answer.mark, { text }) : text);
    }
    if (!answer.text) body.append(element("span", { class: "soft", text: answer.empty }));
    return element("div", {}, element("div", { class: "label", text: answer.label }), body);
  }

  function fieldTable(row) {
    if (!row.fields.length) return null;
    const head = row.fieldHead ?? ["Field", "Value"];
    const cells = (tag, values) => values.map((text) => element(tag, { text, dir: "auto" }));
    const heads = head.map((text) => element("th", { text, scope: "col" }));
    const body = row.fields.map(([name, ...values]) => element("tr", {},
      element("th", { text: name, scope: "row" }), ...cells("td", values)));
    return element("details", row.fields.length <= 12 ? { open: "" } : {},
      element("summary", { text: row.fieldTitle ?? `Fields (${row.fields.length})` }),
      element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Fields" },
        element("table", {},
          element("thead", {}, element("tr", {}, ...heads)),
          element("tbody", {}, ...body))));
  }

  function metaList(row) {
    const items = row.meta ?? [
      ["row", row.row],
      ["file", row.file],
      ["prompt", row.promptTokens === null ? null : `${row.promptTokens} tokens`],
      ["of images", row.imageTokens ? `${row.imageTokens} tokens` : null],
      ["answer", row.tokens === null ? null : `${row.tokens} tokens`],
      ["ended by", row.finish],
      ["latency", row.seconds === null ? null : `${row.seconds} s`],
      ["attempts", row.attempts > 1 ? row.attempts : null],
    ];
    return element("dl", { class: "meta" }, ...items
      .filter(([, value]) => value !== null && value !== "" && value !== undefined)
      .map(([name, value]) => element("div", {},
        element("dt", { text: name }), element("dd", { text: String(value) }))));
  }

  function show(row) {
    const kind = row.badge ?? (row.status === "error" ? "error" : "success");
    const head = element("div", { class: "row-head" },
      element("h3", { text: row.id, dir: "auto" }),
      element("span", { class: `badge ${kind}`, text: row.error || row.status }));
    const images = row.images.map((source, place) => element("img", {
      src: source, alt: `Image ${place + 1} of row ${row.row}`, decoding: "async",
    }));
    const answers = row.answers.map(answerBlock);
    const texts = element("div", { class: "texts" },
      row.message ? element("div", { class: "text message", text: row.message }) : null,
      row.note ? element("div", { class: "soft small", text: `Not shown: ${row.note}` }) : null,
      row.prompt === null ? null : textBlock("Prompt", row.prompt),
      ...(row.sideBySide ? [element("div", { class: "pair" }, ...answers)] : answers),
      fieldTable(row));
    const body = element("div", { class: images.length ? "row-body has-images" : "row-body" },
      images.length ? element("div", { class: "thumbs" }, ...images) : null, texts);
    return element("li", { class: "card" },
      element("article", { "aria-label": `Row ${row.row}` }, head, body, metaList(row)));
  }

  function render() {
    const rows = chosen();
    const size = Number(byId("size").value);
    const last = Math.max(0, Math.ceil(rows.length / size) - 1);
    state.page = Math.min(state.page, last);
    const first = state.page * size;
    const shown = rows.slice(first, first + size);
    list.replaceChildren(...shown.map(show));
    const range = shown.length > 0 ? `, showing ${first + 1} to ${first + shown.length}` : "";
    const found = `${rows.length.toLocaleString("en")} of ${data.length.toLocaleString("en")}`;
    byId("count").textContent = `${found} rows${range}`;
    for (const pager of document.querySelectorAll(".pager")) {
      pager.querySelector(".where").textContent = `Page ${state.page + 1} of ${last + 1}`;
      // Not `disabled`, which would take the focus away from whoever pages by keyboard.
      pager.querySelector(".previous").setAttribute("aria-disabled", String(state.page === 0));
      pager.querySelector(".next").setAttribute("aria-disabled", String(state.page === last));
    }
  }

  // A search answers each letter, and not again when it is left: that would take away what is
  // being clicked.
  const events = { search: "input", status: "change", error: "change", sort: "change" };
  for (const [id, kind] of Object.entries({ ...events, order: "change", size: "change" })) {
    byId(id).addEventListener(kind, () => {
      state.page = 0;
      render();
    });
  }
  byId("clear").addEventListener("click", () => {
    byId("controls").reset();
    state.page = 0;
    render();
    byId("search").focus();
  });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const pager of document.querySelectorAll(".pager")) {
    const turn = (by) => (event) => {
      if (event.currentTarget.getAttribute("aria-disabled") === "true") return;
      state.page += by;
      render();
      if (pager.id === "pager-below") byId("rows-head").scrollIntoView();
    };
    pager.querySelector(".previous").addEventListener("click", turn(-1));
    pager.querySelector(".next").addEventListener("click", turn(1));
  }
  render();
})();
