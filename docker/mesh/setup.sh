#!/bin/bash
# Once, when the compose mesh begins: the operator's token, a token for every agent and
# every service that may do what it needs and no more, and the protocols.
set -euo pipefail
umask 027
export CONSUL_HTTP_ADDR=consul:8500
operator=/consul/operator/token
secret() { sed -n 's/^SecretID: *//p'; }

if [ ! -s $operator ]; then
	consul acl bootstrap | secret >$operator.new
	mv $operator.new $operator
fi
export CONSUL_HTTP_TOKEN_FILE=$operator
consul acl set-agent-token agent "$(consul acl token create -description 'the server' -node-identity "$SERVER:dc1" | secret)"

for service in redis api www; do
	dir=/mesh/$service
	[ ! -s $dir/token ] || continue
	token=$(consul acl token create -description "agent of $service" -node-identity "$service-agent:dc1" | secret)
	(umask 077 && printf 'acl { tokens { agent = "%s" } }\n' "$token" >$dir/agent.hcl)
	consul acl token create -description "$service" -service-identity "$service" | secret >$dir/token.new
	mv $dir/token.new $dir/token
done

for service in api www; do
	printf 'Kind = "service-defaults"\nName = "%s"\nProtocol = "http"\n' $service | consul config write -
done
