"use strict";
// Everything shown comes from the mesh and is hostile text: it only ever becomes
// textContent of an element, never markup.
const $ = (id) => document.getElementById(id);
const el = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const fill = (parent, children) => parent.replaceChildren(...children);
const number = new Intl.NumberFormat("en");
const count = (n) => number.format(n || 0);
const plural = (n, one) => count(n) + " " + one + (n === 1 ? "" : "s");

// A row of a table; on a narrow screen each cell shows its column's name.
const row = (labels, cells) => {
  const tr = el("tr");
  cells.forEach((c, i) => {
    const [text, cls] = Array.isArray(c) ? c : [c];
    const td = el(i === 0 ? "th" : "td", text, cls);
    if (i === 0) td.scope = "row";
    td.dataset.label = labels[i];
    tr.append(td);
  });
  return tr;
};
const list = (pairs) => pairs.filter(([, v]) => v !== undefined && v !== "").flatMap(([k, v, cls]) => [el("dt", k), el("dd", v, cls)]);

const left = (until) => {
  const s = Math.round((Date.parse(until) - Date.now()) / 1000);
  if (s <= 0) return ["has expired", "bad"];
  const d = Math.floor(s / 86400), h = Math.floor(s / 3600) % 24, m = Math.floor(s / 60) % 60;
  const text = d > 0 ? d + " d " + h + " h" : h > 0 ? h + " h " + m + " min" : m > 0 ? m + " min" : s + " s";
  return [text + " left", s < 3600 ? "warn" : ""];
};
const service = (id) => { const m = /\/svc\/([^/]+)$/.exec(id); return m ? m[1] : id; };

const callers = (s) => {
  const labels = ["Caller", "Allowed", "Denied", "Why denied, last time"];
  const all = s.callers || [];
  $("callers").hidden = all.length === 0;
  $("callers-note").textContent = !s.known || !s.service ? "Not known yet." : s.kind && all.length === 0 ? "A gateway passes connections on: the services themselves decide who may call." : !s.listen ? "Nobody can call: this service has no port." : all.length === 0 ? "Nobody has called yet."
    : "Verdicts: one for each connection and policy, one for each request where an intention looks at requests.";
  fill($("callers").tBodies[0], all.map((c) => row(labels, [
    c.source ? service(c.source) + (service(c.source) === c.source ? "" : " (" + c.source + ")") : "no identity",
    [count(c.allowed), "n"], [count(c.denied), c.denied ? "n bad" : "n"],
    c.reason ? c.reason + (c.rule ? " [" + c.rule + "]" : "") : "",
  ])));
};

const self = (s) => {
  if (!s.service) { fill($("self"), list([["Service", "not known yet"]])); return; }
  const pairs = [["Identity", s.spiffe_id], ["Listens", s.listen ? s.listen + ", " + s.protocol : "no: it only calls"]];
  if (s.leaf) {
    const [text, cls] = left(s.leaf.until);
    pairs.push(["Leaf certificate", text + " (serial " + s.leaf.serial + ", " + s.leaf.key + ")", cls]);
  }
  (s.root_list || []).forEach((r) => {
    const [text, cls] = left(r.until);
    pairs.push(["Root", text + " (" + r.name + ")", cls]);
  });
  (s.warnings || []).forEach((w) => pairs.push(["Warning", w, "warn"]));
  fill($("self"), list(pairs));
};

const routes = (u) => {
  const all = u.routes || [];
  if (all.length <= 1 && all.every((r) => r.splits.length <= 1 && r.splits.every((x) => x.targets.length <= 1))) return [];
  const top = el("ol");
  all.forEach((r) => {
    const item = el("li", r.match + (r.rewrite ? ", becomes " + r.rewrite : "") + (r.timeout ? ", within " + r.timeout : "") + (r.retries ? ", tried again " + r.retries + " times" : ""));
    const legs = el("ul");
    r.splits.forEach((x) => {
      const leg = el("li", Number(x.percent.toFixed(2)) + " % to ");
      x.targets.forEach((t, i) => leg.append(el("span", (i ? ", then " : "") + t.name + (t.why ? " (not used: " + t.why + ")" : " (" + count(t.endpoints) + " endpoints)"), t.used ? "good" : "soft")));
      legs.append(leg);
    });
    item.append(legs);
    top.append(item);
  });
  return [top];
};

const upstreams = (s) => {
  const labels = ["Endpoint", "Health", "Weight", "Open", "Latency", "Identity"];
  if (!s.service) { fill($("upstreams"), [el("p", "Not known yet.", "note")]); return; }
  if (s.upstreams.length === 0) { fill($("upstreams"), [el("p", "None.", "note")]); return; }
  fill($("upstreams"), s.upstreams.flatMap((u) => {
    const head = el("h3", u.name + " ");
    head.append(el("span", u.protocol + " at " + u.listen, "soft"));
    const ways = routes(u);
    if (u.endpoints.length === 0) return [head, ...ways, el("p", "No endpoint: calls fail until Consul lists a healthy one.", "bad")];
    const table = el("table"), thead = el("thead"), tr = el("tr"), body = el("tbody");
    table.setAttribute("aria-label", "Endpoints of " + u.name);
    labels.forEach((l, i) => { const th = el("th", l, i === 2 || i === 3 || i === 4 ? "n" : ""); th.scope = "col"; tr.append(th); });
    thead.append(tr);
    u.endpoints.forEach((e) => body.append(row(labels, [
      e.name + " on " + e.node + ", " + e.address + (ways.length ? ", of " + e.target : ""),
      [e.health || "unknown", /^(UP|no check)/.test(e.health || "") ? "good" : "bad"],
      [String(e.weight), "n"], [count(e.sessions), "n"], [e.verified ? e.latency_ms + " ms" : "none yet", "n"],
      [(e.verified ? "verified: " : "expected: ") + u.expects.map(service).join(", "), e.verified ? "good" : "soft"],
    ])));
    table.append(thead, body);
    return [head, ...ways, table];
  }));
};

const bytes = (n) => {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; n >= 1000 && i < units.length - 1; i++) n /= 1000;
  return (i ? n.toFixed(1) : n) + " " + units[i];
};

const gateway = (s) => {
  $("gateway").hidden = s.kind !== "mesh gateway";
  $("peering").hidden = !(s.peers || []).length;
  $("gateway-note").textContent = plural((s.relays || []).length, "target") + "; " + count(s.refused) + " connections refused, as they asked for no such name.";
  const labels = ["Name", "Leads to", "Endpoints", "Connections", "Received", "Sent"];
  fill($("names").tBodies[0], (s.relays || []).map((r) => row(labels, [
    r.names.join(", "), r.target, r.endpoints.length ? [r.endpoints.map((e) => e.address).join(", ")] : ["none", "bad"],
    [count(r.connections), "n"], [bytes(r.bytes_in), "n"], [bytes(r.bytes_out), "n"],
  ])));
  const peer = ["Peer", "State", "Imported", "Exported", "Trust domain"];
  fill($("peers").tBodies[0], (s.peers || []).map((p) => row(peer, [
    p.name, [p.state, p.state === "ACTIVE" ? "good" : "warn"], [count(p.imported_services), "n"], [count(p.exported_services), "n"],
    p.trust_domain || ["its roots are not known", "warn"],
  ])));
};

const haproxy = (s) => {
  const reloads = Object.entries(s.reloads || {}).map(([why, n]) => why + " " + count(n)).join(", ") || "none";
  fill($("haproxy"), list([
    ["Version", s.haproxy], ["Reloads", reloads], ["Last reload", s.last_reload],
    ["Changes without a reload", count(s.runtime_commands)],
    ["Workers that finish", count(s.old_workers)], ["Endpoints that drain", count(s.draining_servers)],
    ["Restarts", count(s.haproxy_restarts), s.haproxy_restarts ? "warn" : ""],
    ["Sessions ended by a new deny", count(s.revoked_sessions) + (s.revocation_pending ? ", more to judge" : ""), s.revocation_pending ? "warn" : ""],
    ["Wrong identities met", count(s.identity_refusals), s.identity_refusals ? "bad" : ""],
    ["Trouble", s.error, "bad"],
  ]));
};

const consul = (s) => {
  const bad = s.consul.filter((f) => f.error);
  fill($("consul"), list([["Watches", plural(s.consul.length, "watch").replace(/watchs$/, "watches") + (bad.length ? "" : ", all answer")],
    ...bad.map((f) => [f.name, f.error, "bad"])]));
  fill($("ignored"), s.ignored.map((i) => el("li", i)));
};

const show = (s) => {
  $("service").textContent = s.service || "haproxy-connect";
  document.title = (s.ready ? "" : "not ready: ") + (s.service || "haproxy-connect");
  const text = s.ready ? "Ready" : "Not ready: " + (s.reasons || []).join("; ");
  if ($("state").textContent !== text) { // said aloud only when it changes
    $("state").textContent = text;
    $("state").className = s.ready ? "good" : "bad";
  }
  callers(s); self(s); upstreams(s); gateway(s); haproxy(s); consul(s);
};

const refresh = async () => {
  try {
    const res = await fetch("status.json", { cache: "no-store" });
    show(await res.json());
  } catch {
    $("state").textContent = "haproxy-connect does not answer; what is below is the last it said";
    $("state").className = "bad";
  }
  setTimeout(refresh, 1000);
};
refresh();
