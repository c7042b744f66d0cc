{{- /* Names and labels. Pods of Ray have keys of our own: KubeRay sets app.kubernetes.io/name itself and selects by it. */ -}}
{{- define "outcrop.fullname" -}}
{{- $name := .Values.fullnameOverride | default .Release.Name -}}
{{- if gt (len $name) 47 }}{{ fail (printf "%s: KubeRay allows 47 characters, set fullnameOverride" $name) }}{{ end -}}
{{- $name -}}
{{- end -}}

{{- define "outcrop.labels" -}}
app.kubernetes.io/name: outcrop
app.kubernetes.io/instance: {{ include "outcrop.fullname" . }}
{{- end -}}

{{- /* (dict "root" $ "component" NAME) */ -}}
{{- define "outcrop.podLabels" -}}
outcrop-instance: {{ include "outcrop.fullname" .root }}
outcrop-component: {{ .component }}
{{- end -}}

{{- /* What selects the pods that serve HTTP. */ -}}
{{- define "outcrop.httpLabels" -}}
outcrop-instance: {{ include "outcrop.fullname" . }}
outcrop-http: "true"
{{- end -}}

{{- /* (dict "root" $ "gpus" N) */ -}}
{{- define "outcrop.image" -}}
{{- $kind := gt (int .gpus) 0 | ternary "cuda" "cpu" -}}
{{- $version := index .root.Values.image $kind -}}
{{- .root.Values.image.repository -}}:{{- $version.tag | default (printf "%s-%s" .root.Chart.AppVersion $kind) -}}
{{- with $version.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "outcrop.redisAddress" -}}
{{- .Values.redis.address | default (printf "%s-redis:6379" (include "outcrop.fullname" .)) -}}
{{- end -}}

{{- /* Pools by name, complete, as YAML. */ -}}
{{- define "outcrop.pools" -}}
{{- range $name, $given := .Values.pools | default (dict "all" dict) }}
{{- if kindIs "map" $given }}
{{ $name }}:
  {{- mergeOverwrite (deepCopy $.Values.poolDefaults) (deepCopy $given) | toYaml | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "outcrop.counts" -}}
{{- range $name, $pool := include "outcrop.pools" . | fromYaml }}{{ $name }} {{ $pool.minReplicas }} {{ $pool.maxReplicas }} {{ end -}}
{{- end -}}

{{- /* "true" where pods download their model themselves. */ -}}
{{- define "outcrop.usesHub" -}}
{{- if and (not .Values.models.volume.enabled) (ne .Values.settings.model "demo") }}true{{ end -}}
{{- end -}}

{{- /* "true" where each kind of actor has pods of its own. */ -}}
{{- define "outcrop.hasRoles" -}}
{{- range include "outcrop.pools" . | fromYaml }}{{ if ne .role "all" }}true{{ break }}{{ end }}{{ end -}}
{{- end -}}
