// A list of things: GET /things, DELETE /things/N, on 127.0.0.1:PORT.
'use strict';
const http = require('http');
const host = require('os').hostname();

http.createServer((req, res) => {
  res.setHeader('Content-Type', 'text/plain');
  if (req.method === 'GET') res.end(`a thing, from ${host}\n`);
  else if (req.method === 'DELETE') res.end(`deleted ${req.url} at ${host}\n`);
  else res.writeHead(405).end('GET or DELETE\n');
}).listen(Number(process.env.PORT || 8080), '127.0.0.1');
process.on('SIGTERM', () => process.exit(0));
