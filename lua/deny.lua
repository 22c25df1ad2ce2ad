-- A denial that its caller hears while it is still sending, for HAProxy 2.6 and HTTP/1:
-- HAProxy closes a connection with unread data, and the answer is lost with it. The service
-- reads up to 1 MiB before the answer, which is the whole of most requests, and up to 64 MiB after.
--
--   http-request use-service lua.deny if ...
--
-- txn.reason goes into X-Denied-Reason where txn.explain is set.

local function read(applet, most)
  local n = 0
  while n < most do
    local part = applet:receive(16384)
    if not part or part == "" then return end
    n = n + #part
  end
end

core.register_service("deny", "http", function(applet)
  local body = "RBAC: access denied"
  read(applet, 1048576)
  applet:set_status(403)
  applet:add_header("content-type", "text/plain")
  applet:add_header("content-length", tostring(#body))
  if applet:get_var("txn.explain") then applet:add_header("x-denied-reason", tostring(applet:get_var("txn.reason") or "")) end
  applet:start_response()
  applet:send(body)
  read(applet, 67108864)
end)
