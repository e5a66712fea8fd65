// Says why the page does not start where page.js, a module, is not run at all.

function sayWhy(text) {
  Object.assign(document.getElementById("status"), { textContent: text, className: "bad" });
}

if (location.protocol === "file:") {
  sayWhy("Opened as a file this page does not start. In its folder, run: python3 -m http.server 8000 --bind 127.0.0.1");
} else {
  // The event of the module's element does not say which of the scripts is missing.
  document.querySelector("script[type=module]").addEventListener("error", () => {
    sayWhy("page.js, or a script that it needs, does not come; expected every file of the folder");
  });
}
