// A visit counter: HTTP on HOST:PORT, the count in Redis at REDIS_PORT, which is the
// sidecar's listener: there is no other way to Redis. /api/... goes to api at API_PORT in
// the same manner.
'use strict';
const http = require('http');
const net = require('net');

const port = Number(process.env.PORT || 8080);
const host = process.env.HOST || '127.0.0.1';
const redisPort = Number(process.env.REDIS_PORT || 6379);
const apiPort = Number(process.env.API_PORT || 9191);

// One command, one answer, one connection: enough of Redis's protocol for INCR.
function incr(key) {
  return new Promise((resolve, reject) => {
    const c = net.connect(redisPort, '127.0.0.1', () => c.write(`*2\r\n$4\r\nINCR\r\n$${key.length}\r\n${key}\r\n`));
    let got = '';
    c.setTimeout(5000, () => c.destroy(new Error('Redis does not answer')));
    c.on('data', (d) => {
      got += d;
      if (!got.includes('\r\n')) return;
      c.end();
      if (got[0] === ':') resolve(Number(got.slice(1)));
      else reject(new Error(got.trim()));
    });
    c.on('error', reject);
    c.on('close', () => reject(new Error('the connection to Redis was closed without an answer')));
  });
}

function forward(req, res) {
  const call = http.request({ host: '127.0.0.1', port: apiPort, path: req.url.slice('/api'.length), method: req.method }, (answer) => {
    res.writeHead(answer.statusCode, answer.headers);
    answer.pipe(res);
  });
  call.on('error', (e) => res.writeHead(502).end(`No api: ${e.message}\n`));
  req.pipe(call);
}

http.createServer(async (req, res) => {
  if (req.url.startsWith('/api/')) {
    forward(req, res);
    return;
  }
  if (req.url !== '/') {
    res.writeHead(404).end('not here\n');
    return;
  }
  try {
    const n = await incr('visits');
    res.writeHead(200, { 'Content-Type': 'text/plain' }).end(`You are visitor number ${n}.\n`);
  } catch (e) {
    res.writeHead(502, { 'Content-Type': 'text/plain' }).end(`No Redis: ${e.message}\n`);
  }
}).listen(port, host);
process.on('SIGTERM', () => process.exit(0));
