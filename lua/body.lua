-- A limit on the bytes of a request's body, for bodies whose length is not announced. Loaded
-- once per thread.
--
--   filter lua.body BYTES

local Body = { id = "body", flags = filter.FLT_CFG_FL_HTX } -- without the flag an HTTP proxy ignores it in silence
Body.__index = Body

function Body:new()
  return setmetatable({ n = 0, limit = self.limit }, Body)
end

function Body:start_analyze(txn, chn)
  if not chn:is_resp() then filter.register_data_filter(self, chn) end
end

function Body:http_payload(txn, msg)
  self.n = self.n + msg:input()
  if self.n > self.limit then error("the request is too large", 0) end
end

core.register_filter("body", Body, function(flt, args)
  flt.limit = tonumber(args[1])
  return flt
end)
