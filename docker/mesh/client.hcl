# The agent beside one service. Its HTTP API is a socket that only the service's
# containers have; setup.sh adds its token.
data_dir   = "/consul/data"
retry_join = ["consul"]
retry_interval = "1s"
addresses { http = "unix:///run/consul/agent.sock" }
unix_sockets { mode = "0660" }
ports { grpc = -1, grpc_tls = -1, dns = -1 }
acl {
  enabled        = true
  default_policy = "deny"
}
log_level = "warn"
disable_update_check = true
