// Opens pages in headless Chromium at three widths: console errors, network requests, axe-core's findings, screenshots. Prints JSON.
// Run: node look.mjs OUT PAGE...   needs playwright-core and axe-core (npm install) and Chromium.
import { createRequire } from "node:module";
import { readFileSync, mkdirSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.env.NODE_MODULES ?? process.cwd(), "x.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [out, ...pages] = process.argv.slice(2);
mkdirSync(out, { recursive: true });
const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: quiet });
const found = [];
for (const page of pages) {
  for (const [width, colorScheme] of [390, 820, 1440].flatMap((w) => [[w, "light"], [w, "dark"]])) {
    const context = await browser.newContext({ viewport: { width, height: 900 }, colorScheme });
    const tab = await context.newPage();
    const errors = [], requests = [];
    tab.on("console", (m) => m.type() === "error" && errors.push(m.text()));
    tab.on("pageerror", (e) => errors.push(String(e)));
    tab.on("request", (r) => r.url().startsWith("data:") || requests.push(r.url()));
    await tab.goto(pathToFileURL(resolve(page)).href);
    const name = `${basename(dirname(resolve(page)))}-${width}-${colorScheme}`;
    await tab.screenshot({ path: join(out, `${name}.png`), fullPage: true, timeout: 120_000 });
    const wide = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    await tab.evaluate(axe); // through the debugger, which the page's own policy does not reach
    const result = await tab.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
    const serious = result.violations.filter((v) => ["serious", "critical"].includes(v.impact))
      .map((v) => `${v.id}: ${v.nodes.length} x ${v.nodes[0].html.slice(0, 160)} ${v.nodes[0].failureSummary ?? ""}`);
    // Each box in the legend hides its target's marks, and only those.
    const filters = await tab.evaluate(() => [...document.querySelectorAll(".legend input")].map((box, nth) => {
      const shown = (css) => [...document.querySelectorAll(`.filtered ${css}`)].filter((e) => getComputedStyle(e).display !== "none").length;
      const all = document.querySelectorAll(".filtered svg.chart [class^=t]").length, own = shown(`.t${nth}`);
      box.click();
      const left = [shown(`.t${nth}`), shown("svg.chart [class^=t]")];
      box.click();
      return own > 0 && left[0] === 0 && left[1] === all - own;
    }));
    await tab.setViewportSize({ width: 688, height: 990 }); // A4 less the page's margins
    await tab.emulateMedia({ media: "print" });
    const paper = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    found.push({ page, width, colorScheme, errors, requests: requests.slice(1), overflow: wide, serious, filters, paper, minor: result.violations.length - serious.length });
    await context.close();
  }
}
await browser.close();
console.log(JSON.stringify(found, null, 1));
