# The server of the compose mesh: ACLs on, and nothing allowed that is not granted.
server           = true
bootstrap_expect = 1
data_dir         = "/consul/data"
client_addr      = "0.0.0.0"
ui_config { enabled = true }
connect { enabled = true }
acl {
  enabled                  = true
  default_policy           = "deny"
  enable_token_persistence = true
}
performance { raft_multiplier = 1 }
log_level = "warn"
disable_update_check = true
