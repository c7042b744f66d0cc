{{- /* serveConfigV2: one application, deploy.app:build, with `settings` as its arguments. Where each kind of actor has pods
       of its own, actors ask for the custom resource that these pods offer, and wait until one has room. */ -}}
{{- define "outcrop.serveConfig" -}}
{{- $settings := deepCopy .Values.settings -}}
{{- range list "api_key" "host" "port" "name" -}}
{{- if hasKey $settings . }}{{ fail (printf "settings.%s is not for Kubernetes: the chart sets it" .) }}{{ end -}}
{{- end -}}
{{- $hasRoles := include "outcrop.hasRoles" . -}}
{{- if $hasRoles -}}
{{- $_ := set $settings "front_resources" (dict "outcrop_front" 1) -}}
{{- $_ := set $settings "replica_resources" (dict "outcrop_expert" 1) -}}
{{- end -}}
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - name: outcrop
    route_prefix: /
    import_path: deploy.app:build
    args:
      {{- toYaml $settings | nindent 6 }}
    deployments:
    {{- range $name := list "supervisor" "gate" "ingress" }}
      - name: {{ $name }}
        ray_actor_options:
          num_cpus: {{ (index $.Values.deployments $name).cpus }}
          {{- if $hasRoles }}
          resources: {outcrop_ingress: 0.01}
          {{- end }}
        {{- if and $hasRoles (eq $name "ingress") }}
        max_replicas_per_node: 1
        {{- end }}
    {{- end }}
{{- end -}}
