-- What routes need beyond HAProxy's own words. Loaded once per thread.

-- joined is all lines of a request header with commas between them, as Envoy matches it.
core.register_fetches("joined", function(txn, name)
  local lines = txn.http:req_get_headers()[name]
  if not lines then return nil end
  local out, i = {}, 0
  while lines[i] do
    out[i + 1] = lines[i]
    i = i + 1
  end
  return table.concat(out, ",")
end)

-- total ends an answer that takes longer than txn.total milliseconds, at the next data that
-- arrives after that. HAProxy's own timeout bounds silence.
local Total = { id = "total", flags = filter.FLT_CFG_FL_HTX } -- without the flag an HTTP proxy ignores it in silence
Total.__index = Total

local function now()
  local t = core.now()
  return t.sec * 1000 + t.usec // 1000
end

function Total:new() return setmetatable({}, Total) end

function Total:start_analyze(txn, chn)
  local limit = chn:is_resp() and tonumber(txn:get_var("txn.total"))
  if limit then
    self.till = now() + limit
    filter.register_data_filter(self, chn)
  end
end

function Total:http_payload(txn, msg)
  if now() > self.till then error("request timeout", 0) end
end

core.register_filter("total", Total, function(flt, args) return flt end)
