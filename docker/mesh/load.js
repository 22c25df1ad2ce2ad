// Calls api and redis through the sidecar's listeners until its standard input ends, then
// prints what came of it. Beside www, in its container.
'use strict';
const http = require('http');
const net = require('net');

const agent = new http.Agent({ keepAlive: true });
const count = { api: 0, redis: 0, failed: 0, first: '' };
let ended = false;

function api() {
  return new Promise((resolve, reject) => {
    http.get({ host: '127.0.0.1', port: 9191, path: '/things', agent, timeout: 10000 }, (res) => {
      res.resume();
      res.on('end', () => (res.statusCode === 200 ? resolve() : reject(new Error(`api answered ${res.statusCode}`))));
      res.on('error', reject);
    }).on('error', reject);
  });
}

function redis() {
  return new Promise((resolve, reject) => {
    const c = net.connect(6379, '127.0.0.1', () => c.write('INCR load\r\n'));
    c.on('data', (d) => {
      c.end();
      if (d[0] === 0x3a) resolve();
      else reject(new Error(`redis answered ${d}`));
    });
    c.on('error', reject);
    c.on('close', () => reject(new Error('redis closed without an answer')));
  });
}

async function caller(name, call) {
  while (!ended) {
    const began = new Date();
    try {
      await call();
      count[name]++;
    } catch (e) {
      count.failed++;
      if (!count.first) count.first = `${name}, begun ${began.toISOString()}, after ${Date.now() - began} ms: ${e.message}`;
    }
    await new Promise((go) => setTimeout(go, 10)); // a steady load, not a flood
  }
}

process.stdin.resume();
process.stdin.on('end', () => { ended = true; });
console.log('begun');
Promise.all([caller('api', api), caller('api', api), caller('redis', redis), caller('redis', redis)]).then(() => {
  console.log(JSON.stringify(count));
  process.exit(0);
});
