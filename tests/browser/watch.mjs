// Watches a run's page in headless Chromium until it shows a verdict: what it showed on the way, console errors, requests elsewhere. Prints JSON.
// Run: node watch.mjs OUT ADDRESS   needs playwright-core and axe-core (npm install) and Chromium.
import { createRequire } from "node:module";
import { readFileSync, mkdirSync } from "node:fs";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_MODULES ?? process.cwd(), "x.js"));
const { chromium } = require("playwright-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
const [out, address] = process.argv.slice(2);
mkdirSync(out, { recursive: true });
const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: quiet });
const tab = await (await browser.newContext({ viewport: { width: 390, height: 900 } })).newPage();
const errors = [], elsewhere = [], seen = [];
tab.on("console", (m) => m.type() === "error" && errors.push(m.text()));
tab.on("pageerror", (e) => errors.push(String(e)));
tab.on("request", (r) => r.url().startsWith(address) || r.url().startsWith("data:") || elsewhere.push(r.url()));
await tab.goto(address);
const look = () => tab.evaluate(() => ({
  verdict: document.getElementById("verdict").textContent,
  now: document.querySelector("#steps .now")?.textContent ?? "",
  losses: document.querySelectorAll("#curves .loss").length,
  candidates: document.getElementById("candidates").tBodies[0].rows.length,
}));
let shots = 0;
for (const end = Date.now() + 240_000; Date.now() < end; ) {
  const state = await look();
  if (JSON.stringify(state) !== JSON.stringify(seen[seen.length - 1])) seen.push(state);
  if (state.verdict) break;
  if ((state.losses && !shots) || (state.candidates > 2 && shots < 2)) await tab.screenshot({ path: join(out, `watch-${++shots}.png`), fullPage: true });
  await tab.waitForTimeout(200);
}
const wide = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
await tab.screenshot({ path: join(out, "watch-end.png"), fullPage: true });
await tab.evaluate(axe);
const result = await tab.evaluate(() => axe.run(document, { resultTypes: ["violations"] }));
const serious = result.violations.filter((v) => ["serious", "critical"].includes(v.impact)).map((v) => `${v.id}: ${v.nodes[0].html.slice(0, 160)}`);
await browser.close();
console.log(JSON.stringify({ errors, elsewhere, seen, overflow: wide, serious }, null, 1));
