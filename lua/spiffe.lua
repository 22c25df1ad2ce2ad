-- Server identity for TCP-mode connectors: holds every byte of the client until
-- the server's certificate names one of the expected SPIFFE IDs.
--
-- Load with lua-load-per-thread only (haproxy/haproxy#2467), and use in TCP mode
-- only: in HTTP mode HAProxy lets the header block pass a Lua filter. Each place
-- that uses the filter also has the native guard rule
--     tcp-request content reject unless { var(txn.spiffe_armed) -m bool }
-- because a filter whose creation fails is ignored in silence.
--
--   filter lua.spiffe ID [ID ...]   the expected IDs
--   filter lua.spiffe slot          the IDs in txn.spiffe_ids, "|" before each

local byte, sub, find, match = string.byte, string.sub, string.find, string.match

-- tlv reads a DER header at p, inside last: it returns tag, first and last content byte; nil
-- when malformed. It takes lengths up to 64 KiB, in their shortest form only.
local function tlv(s, p, last)
  local t, l = byte(s, p, p + 1)
  if not l or p >= last then return nil end
  local c = p + 2
  if l >= 0x80 then
    if l == 0x81 then
      l = byte(s, c)
      c = c + 1
      if not l or l < 0x80 then return nil end
    elseif l == 0x82 then
      local a, b = byte(s, c, c + 1)
      c = c + 2
      if not b then return nil end
      l = a * 256 + b
      if l < 0x100 then return nil end
    else
      return nil
    end
  end
  local e = c + l - 1
  if e > last then return nil end
  return t, c, e
end

-- one_uri reads the names inside the SAN extension whose value starts at p: it returns the one
-- URI, or nil and why there is none.
local function one_uri(der, p, e)
  local t, c, last = tlv(der, p, e)
  if t == 0x01 then t, c, last = tlv(der, last + 1, e) end -- "critical"
  if t ~= 0x04 or last ~= e then return nil, "malformed SAN" end
  t, c, last = tlv(der, c, e)
  if t ~= 0x30 or last ~= e then return nil, "malformed SAN" end
  local uri
  while c <= e do
    local nt, nc, ne = tlv(der, c, e)
    if not nt then return nil, "malformed SAN" end
    if nt == 0x86 then
      if uri then return nil, "two URI SANs" end
      uri = sub(der, nc, ne)
    end
    c = ne + 1
  end
  if not uri then return nil, "no URI SAN" end
  return uri
end

-- uri_san returns the single URI SAN of a DER certificate, or nil and a reason.
local function uri_san(der)
  local n = #der
  local t, c, e = tlv(der, 1, n)
  if t ~= 0x30 or e ~= n then return nil, "not a certificate" end
  t, c, e = tlv(der, c, e)
  if t ~= 0x30 then return nil, "no tbsCertificate" end
  local last, p = e, c
  repeat -- to [3], the extensions, which are the last field
    if p > last then return nil, "no extensions" end
    t, c, e = tlv(der, p, last)
    if not t then return nil, "malformed field" end
    p = e + 1
  until t == 0xA3
  if e ~= last then return nil, "data after the extensions" end
  t, c, e = tlv(der, c, e)
  if t ~= 0x30 or e ~= last then return nil, "malformed extensions" end
  p = c
  local from, to
  while p <= last do
    t, c, e = tlv(der, p, last)
    if t ~= 0x30 then return nil, "malformed extension" end
    if sub(der, c, c + 4) == "\x06\x03\x55\x1d\x11" then -- 2.5.29.17
      if from then return nil, "two SAN extensions" end
      from, to = c + 5, e
    end
    p = e + 1
  end
  if not from then return nil, "no SAN" end
  return one_uri(der, from, to)
end

local F = { id = "SPIFFE ID of the server" }
F.__index = F

function F:new()
  return setmetatable({ ids = self.ids, slot = self.slot }, F)
end

function F:start_analyze(txn, chn)
  if self.ok then return end -- the response side of a verified stream
  filter.register_data_filter(self, chn)
  if not chn:is_resp() then txn:set_var("txn.spiffe_armed", true) end
end

local function verdict(self, txn)
  local der = txn.f:ssl_s_der()
  if der == nil or der == "" then return nil end -- no handshake yet
  local uri, why = uri_san(der)
  if not uri then return false, why end
  if self.slot then
    local want = txn:get_var("txn.spiffe_ids")
    -- The slot is address|port|ID|ID...: only what follows the port is an identity.
    local ids = type(want) == "string" and match(want, "^[^|]*|[^|]*(|.*)$")
    if ids and find(ids .. "|", "|" .. uri .. "|", 1, true) and not find(uri, "|", 1, true) then return true end
  elseif self.ids[uri] then
    return true
  end
  return false, uri
end

function F:tcp_payload(txn, chn)
  local ok = self.ok
  if ok == nil then
    local ran, res, who = pcall(verdict, self, txn)
    if ran and res == nil then return 0 end -- hold everything
    ok = ran and res == true
    self.ok = ok
    if not ok then
      local shown = tostring(ran and who or res):gsub("[^%w%p]", "?")
      local place = txn.f:be_name() .. "/" .. txn.f:srv_name()
      local slot = self.slot and txn:get_var("txn.spiffe_ids")
      if type(slot) == "string" then place = slot:gsub("|.*", "", 1):gsub("[^%w%p]", "?") .. " port " .. slot:gsub("^[^|]*|([^|]*).*", "%1") end
      core.Alert("identity refused: " .. place .. " presented " .. sub(shown, 1, 300))
    end
  end
  -- Raise: a negative return value would forward everything.
  if not ok then error("refused", 0) end
  filter.unregister_data_filter(self, chn)
end

-- HAProxy drops a data filter when a timeout or an error hits the channel, and
-- would flush what it held: abort instead. Once per direction, or the stream
-- would never end.
function F:end_analyze(txn, chn)
  if self.ok ~= true then
    local dir = chn:is_resp() and "res_end" or "req_end"
    if not self[dir] then
      self[dir] = true
      return filter.ERROR
    end
  end
  return filter.CONTINUE
end

core.register_filter("spiffe", F, function(flt, args)
  flt.ids = {}
  flt.slot = args[1] == "slot"
  for _, a in ipairs(args) do flt.ids[a] = true end
  return flt
end)
